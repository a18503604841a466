"""Every option of the commands that do not train: name, type, default and help text. No torch here, so that `--help` is instant."""

from dataclasses import dataclass, field
from typing import Literal

from tunesmith.options.training import ChatOptions, DataOptions, GenerateOptions


@dataclass(frozen=True)
class DataCommand:
    """Build or check a data set: rows, tokens, lengths, what was skipped and why."""

    data: DataOptions = field(default_factory=DataOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)
    tokenizer: str = "gpt2"
    """MODEL whose tokenizer counts the tokens; `gpt2` comes with the package."""
    show: int = 0
    """Print the first N rows, with the tokens that carry loss highlighted."""
    audit: bool = False
    """Look for defects, lost endings, leaks and length bias; each finding names file and line and how to fix it."""
    against: list[str] = field(default_factory=list)
    """With audit: another data set that should share no rows with this one; repeatable."""
    out: str | None = None
    """With audit: also write the findings to this JSON file."""


@dataclass(frozen=True)
class BaseOptions:
    """What a MODEL stands on"""

    base: str | None = None
    """Of an adapter whose base is not found (it has moved, say): the base, a MODEL."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Loss and perplexity of a model on the test rows of a data set; on pairs, how often it prefers the chosen answer."""

    model: BaseOptions = field(default_factory=BaseOptions)
    data: DataOptions = field(default_factory=DataOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)
    batch_size: int = 1
    """Rows of block_size tokens in one forward pass."""
    split: Literal["test", "train"] = "test"
    """Which rows to measure; without a test split, all of them."""
    trained: Literal["auto", "leave_out", "keep"] = "auto"
    """Rows that MODEL was trained on, if it is a run: leave them out, or keep and count them; auto: out, but kept with split train."""
    reference: str | None = None
    """On pairs: MODEL to compare the answers' log-probabilities with; default: the model a DPO run started from."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward pass."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    out: str | None = None
    """Also write the figures to this JSON file."""


@dataclass(frozen=True)
class ScoreCommand:
    """Answers to a set of prompts, scored by a reward model; every mean reward has a 95 % interval."""

    model: BaseOptions = field(default_factory=BaseOptions)
    reward: str = "OpenAssistant/reward-model-deberta-v3-large-v2"
    """Reward model: a run of `tunesmith reward`, or any sequence classifier, local or on the hub; the default is downloaded."""
    prompts: str | None = None
    """Prompt file: one per line, or rows with `prompt` and optionally `group`, or any data format; default: the embedded 40."""
    samples: int = 1
    """Answers per prompt; with more than one, best-of-n is shown beside the mean."""
    fluency: str | None = None
    """MODEL that says how likely it finds the answers after their own prompt and after another one, in nats a token."""
    generate: GenerateOptions = field(default_factory=GenerateOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)
    limit: int | None = None
    """Use only the first N prompts."""
    shown: int = 2
    """Number of best and of worst prompts to print with their answers."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    out: str | None = None
    """Directory for scores.json and each model's answers; without it, a run's answers go to its own answers/."""


@dataclass(frozen=True)
class CompareCommand:
    """The same prompts to two models, side by side; differences and win rates are those of B against A."""

    model: BaseOptions = field(default_factory=BaseOptions)
    prompts: str | None = None
    """Prompt file: one per line, or rows with `prompt` and optionally `group`, or any data format; default: the embedded 40."""
    generate: GenerateOptions = field(default_factory=GenerateOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)
    limit: int | None = None
    """Use only the first N prompts."""
    reward: str | None = None
    """Reward model that scores the answers: a run of tunesmith reward, or a sequence classifier, local or on the hub."""
    logprobs: bool = False
    """Colour every answer's tokens by the change in their log-probability between the models."""
    judge: str | None = None
    """Base URL of an OpenAI-compatible API (http://localhost:8000/v1) whose model judges which answer is better, asked in both
    orders. The key, if it needs one, is read from the environment variable OPENAI_API_KEY."""
    judge_model: str | None = None
    """Name of the judge's model."""
    judge_parallel: int = 4
    """Number of questions sent to the judge at once."""
    judge_timeout: float = 60.0
    """Seconds to wait for the judge before a question is sent again."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    out: str | None = None
    """Also write prompts, answers and results to this JSONL file, and the summary to FILE.summary.json."""
    html: str | None = None
    """Also write one self-contained HTML page to this file."""


@dataclass(frozen=True)
class ChatCommand:
    """Talk to a model in the terminal."""

    model: BaseOptions = field(default_factory=BaseOptions)
    generate: GenerateOptions = field(default_factory=GenerateOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)
    system: str | None = None
    """System prompt, placed before the conversation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class ReportCommand:
    """One HTML page for finished runs, or for a study with a verdict on every claim; figures and tables as files beside it."""

    out: str | None = None
    """HTML file to write; default: report.html in the first run's directory, report/index.html in a study's."""


@dataclass(frozen=True)
class DemoCommand:
    """The whole chain on a small model and the embedded dialogues, in minutes on two CPU cores."""

    model: str = "auto"
    """smollm2 (dequantised from 4 bits), sample (embedded, offline, two to eight minutes) or another MODEL; auto: smollm2 if
    it is installed."""
    out: str | None = None
    """Output directory; default: runs/demo, or the next free name."""
    steps: int | None = None
    """Optimizer steps of each training run; default: what suits the model."""
    open: Literal["auto"] | bool = "auto"
    """Open the report in a browser; auto: if there is a display."""


@dataclass(frozen=True)
class StudyData:
    """Where the data of all runs is"""

    root: str | None = None
    """Local copy of HH-RLHF, as data.root of the training commands."""
    rm_static: str | None = None
    """Local copy of Dahoas/rm-static, as data.rm_static of the training commands."""


@dataclass(frozen=True)
class StudyCommand:
    """Run a matrix of training runs: a built-in study (paper) or a YAML file. Finished runs are skipped, interrupted ones resumed."""

    scale: str | None = None
    """One of the study's scales; paper has full, small and smoke. Default: the first."""
    dry_run: bool = False
    """Only list the runs, with the memory and time each will take."""
    out: str | None = None
    """Output directory; default: studies/NAME-SCALE."""
    only: str | None = None
    """Only these experiments or runs, separated by commas, and the runs they depend on."""
    batching: Literal["paper", "ours", "as_set"] | None = None
    """paper: random windows with loss on all tokens; ours: whole dialogues packed, loss on the assistant's turns; as_set: as the runs'
    settings say. Default: as the study's file says."""
    data: StudyData = field(default_factory=StudyData)
    jobs: int | None = None
    """Runs at a time on this machine (on Ray: on each); default: one per GPU, or one on a CPU."""
    executor: Literal["local", "ray"] = "local"
    """ray: run on the machines of a Ray cluster that share this directory."""
    ray_address: str | None = None
    """Address of the cluster; default: RAY_ADDRESS, else a cluster running on this machine."""
