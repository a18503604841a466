"""What the tests share: a cache of their own, a tiny real model, and the real dialogues where they are at hand."""

import os
import random
import signal
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("suite", deadline=None)  # the default of 0.2 s an example is a matter of speed
hypothesis.settings.load_profile("suite")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the suite proves the CPU; tests marked gpu have their own command
os.environ["HF_HUB_OFFLINE"] = "1"
# Models this small only wait for a second thread: on a busy machine that makes seconds into minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Started with nohup, we and all that we start would ignore a terminal that closes.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tokens are cached per session: nothing is read from or left in the user's cache."""
    os.environ["TUNESMITH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeds():
    import torch

    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real dialogues that lie beside a developer's checkout; tests that need them skip without."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the real dialogues (../shared/data) are not on this machine")
    return path


@pytest.fixture(scope="session")
def tokenizer():
    """GPT-2's own tokenizer."""
    from tunesmith.data.tokenizer import Tokenizer

    return Tokenizer.gpt2()


@pytest.fixture
def tiny_model():
    """Two layers, width 32, GPT-2's vocabulary, random weights; weights enlarged so that logits are far from flat."""
    import torch

    from tunesmith.models.gpt2 import GPT, GPTConfig

    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory) -> Path:
    """A model directory small enough to train in a second: 2 layers, width 48, block size 256, the sample's tokenizer."""
    import torch

    from tunesmith.data.tokenizer import Tokenizer
    from tunesmith.files.names import SAMPLE
    from tunesmith.files.weights import save_model
    from tunesmith.models.gpt2 import GPT, GPTConfig

    tokenizer = Tokenizer.load(SAMPLE)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=48, vocab_size=tokenizer.vocab_size, block_size=256))
    model.init_weights(torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("tiny")
    save_model(model, tokenizer, path)
    return path


@pytest.fixture(scope="session")
def deberta(tmp_path_factory) -> Path:
    """The directory of a DeBERTa with random weights and one score, as transformers saves it."""
    from tiny_judge import save_deberta

    path = tmp_path_factory.mktemp("deberta")
    save_deberta(path)
    return path
