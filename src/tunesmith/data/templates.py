"""Our own templates by their names."""

from tunesmith.data.chatml_template import CHATML
from tunesmith.data.gemma_template import GEMMA
from tunesmith.data.hh_template import HH
from tunesmith.data.llama3_template import LLAMA3

TEMPLATES = {template.name: template for template in (HH, CHATML, LLAMA3, GEMMA)}
