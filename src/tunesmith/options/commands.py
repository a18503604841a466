"""Every option of the commands that train nothing: name, type, default and help text. No torch here, so that `--help` is instant."""

from dataclasses import dataclass, field
from typing import Literal

from tunesmith.options.training import DataOptions, GenerateOptions


@dataclass(frozen=True)
class DataCommand:
    """Build or check a data set: rows, tokens, lengths, what was skipped and why."""

    data: DataOptions = field(default_factory=DataOptions)
    tokenizer: str = "gpt2"
    """MODEL whose tokenizer counts; `gpt2` comes with the package."""
    show: int = 0
    """Print the first N rows with the tokens that carry loss in colour."""
    audit: bool = False
    """Look for defects, lost ends, leaks and length bias, with file and line and the way out of each."""
    against: list[str] = field(default_factory=list)
    """With audit: another data set in which none of these rows should be; repeatable."""
    out: str | None = None
    """With audit: also write what was found to this JSON file."""


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
    batch_size: int = 1
    """Rows of block_size tokens in one forward pass."""
    split: Literal["test", "train"] = "test"
    """Which rows; without a test split, all of them."""
    trained: Literal["auto", "leave_out", "keep"] = "auto"
    """Rows that MODEL was trained on, where it is a run: leave them out, or keep and count them; auto: out, but kept with split train."""
    reference: str | None = None
    """On pairs: MODEL against which the log-probabilities of answers are held; default what a DPO run started from."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    out: str | None = None
    """Also write the figures to this JSON file."""


@dataclass(frozen=True)
class ScoreCommand:
    """Answers to a set of prompts, scored by a reward model; every mean reward with its 95 % interval."""

    model: BaseOptions = field(default_factory=BaseOptions)
    reward: str = "OpenAssistant/reward-model-deberta-v3-large-v2"
    """The reward model: a run of `tunesmith reward`, or any sequence classifier, local or on the hub; the default is downloaded."""
    prompts: str | None = None
    """File of prompts: one a line, or rows with `prompt` and perhaps `group`, or of any form of data; default the embedded 40."""
    samples: int = 1
    """Answers a prompt; with more than one, best-of-n stands beside the mean."""
    generate: GenerateOptions = field(default_factory=GenerateOptions)
    limit: int | None = None
    """Use only the first N prompts."""
    shown: int = 2
    """How many of the best and of the worst prompts to print with their answers."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    out: str | None = None
    """Directory for scores.json and the answers of each model; a run's answers go to its own answers/ without it."""


@dataclass(frozen=True)
class CompareCommand:
    """The same prompts to two models, side by side; differences and win rates are those of B against A."""

    model: BaseOptions = field(default_factory=BaseOptions)
    prompts: str | None = None
    """File of prompts: one a line, or rows with `prompt` and perhaps `group`, or of any form of data; default the embedded 40."""
    generate: GenerateOptions = field(default_factory=GenerateOptions)
    limit: int | None = None
    """Use only the first N prompts."""
    reward: str | None = None
    """Reward model that scores the answers: a run of tunesmith reward, or a sequence classifier, local or on the hub."""
    logprobs: bool = False
    """Show every answer's tokens in the colour of their change in log-probability between the models."""
    judge: str | None = None
    """Base URL of an OpenAI-compatible API (http://localhost:8000/v1) whose model says which answer is better, asked in both
    orders. The key, where it wants one, is read from the environment variable OPENAI_API_KEY."""
    judge_model: str | None = None
    """Name of the judge's model."""
    judge_parallel: int = 4
    """Questions to the judge at one time."""
    judge_timeout: float = 60.0
    """Seconds to wait for the judge before a question is sent again."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    out: str | None = None
    """Also write prompts, answers and what was found of each to this JSONL file, and the summary to FILE.summary.json."""
    html: str | None = None
    """Also write one self-contained HTML page to this file."""


@dataclass(frozen=True)
class ChatCommand:
    """Talk to a model in the terminal."""

    model: BaseOptions = field(default_factory=BaseOptions)
    generate: GenerateOptions = field(default_factory=GenerateOptions)
    system: str | None = None
    """System prompt: stands before the conversation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class ReportCommand:
    """One HTML page of finished runs, or of a study with a verdict on every claim; figures and tables as files beside it."""

    out: str | None = None
    """The page; default report.html in the first run's directory, report/index.html in a study's."""


@dataclass(frozen=True)
class DemoCommand:
    """The whole chain on the embedded sample, in minutes on two CPU cores."""

    out: str | None = None
    """Directory; default runs/demo, or the next free name."""
    steps: int = 120
    """Optimizer steps of each training."""
    open: Literal["auto"] | bool = "auto"
    """Show the report in a browser; auto: where there is a display."""


@dataclass(frozen=True)
class StudyData:
    """Where the data of all runs lie"""

    root: str | None = None
    """Local copy of HH-RLHF, as data.root of the training commands."""
    rm_static: str | None = None
    """Local copy of Dahoas/rm-static, as data.rm_static of the training commands."""


@dataclass(frozen=True)
class StudyCommand:
    """Run a matrix of trainings: a built-in study (paper) or a YAML file. What is done is skipped, what was cut goes on."""

    scale: str | None = None
    """One of the study's scales; paper has full, small and smoke. Default the first."""
    dry_run: bool = False
    """Only show the runs, with the memory and time that each will take."""
    out: str | None = None
    """Directory; default studies/NAME-SCALE."""
    only: str | None = None
    """Only these experiments or runs, joined by commas, and what they need."""
    batching: Literal["paper", "ours", "as_set"] | None = None
    """paper: random windows with loss on all tokens; ours: whole dialogues packed, loss on the assistant's turns; as_set: as the
    settings say. Default as the study's file."""
    data: StudyData = field(default_factory=StudyData)
    jobs: int | None = None
    """Runs at a time on this machine (on Ray: on each); default one a GPU, on a CPU one."""
    executor: Literal["local", "ray"] = "local"
    """ray: on the machines of a Ray cluster that share this directory."""
    ray_address: str | None = None
    """Address of the cluster; default RAY_ADDRESS, else the cluster that runs here."""
