"""The dataclasses that make up an experiment: frozen, keyword-only, complete before anything starts."""

import dataclasses
import functools
from typing import Literal

from euroflax import languages

Origin = Literal["public", "licensed", "crawled", "user", "synthetic", "unknown"]
OptOut = Literal["honoured", "not applicable", "not honoured", "unknown"]
Strategy = Literal["natural", "uniform", "temperature"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A body of text in one language, with what must be known of where it comes from."""

    name: str
    """A name of its own within the experiment."""
    language: str
    """Language code; aliases such as ekk or lvs are folded."""
    path: str
    """A file, a folder of files or a pattern with * below the data root; `sample:FILE` is the embedded text."""
    licence: str
    """The licence of the text, or unknown."""
    provider: str
    """Who gave the text, or unknown."""
    origin: Origin
    """How the text came to be in the source."""
    opt_out: OptOut
    """What became of the opt-outs of rights holders."""
    generator: str | None = None
    """The model that wrote the text; stated for synthetic text, and for nothing else."""
    text_field: str = "text"
    """The field that holds the text; a dot reaches into nested fields."""
    id_field: str | None = "id"
    """The field that holds the document's id; None names documents by file and line."""
    provider_field: str | None = None
    """The field that holds the provider, where it varies by document."""
    licence_field: str | None = None
    """The field that holds the licence, where it varies by document."""
    holdout_fraction: float = 0.0
    """The share of documents, chosen by a hash of their id, that is evaluated on and never trained on."""
    block_list: str | None = None
    """A file below the data root with ids of withdrawn documents, one a line; they are left out from now on."""
    expected_bytes: int | None = None
    """Declared size of the text in UTF-8 bytes, for a plan before the data is there."""
    expected_tokens: int | None = None
    """Declared size in tokens, for a plan before the data is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """How much of each source a run reads: by `weights`, or by `languages` and in each language by `sources`."""

    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Fixed share of each source by its name, summing to 1; empty leaves it to `languages` and `sources`."""
    languages: dict[str, float] | Strategy | Literal["unimax"] = "natural"
    """Fixed share of each language, summing to 1, or how they are found: in proportion to size (`natural`), all the
    same (`uniform`), to size to the power of `alpha` (`temperature`), or as near to the same as `max_epochs` lets
    them be (`unimax`)."""
    sources: dict[str, float] | Strategy = "natural"
    """Fixed share of each source within its language, summing to 1 in each, or how they are found."""
    alpha: float | None = None
    """The exponent of `temperature`: 1 is natural, 0 is uniform."""
    language_floor: float = 0.0
    """The least share of a language; the others give in proportion. Not for fixed shares."""
    max_epochs: float | None = None
    """The most often that a source may be read by the end of the stage; more is refused, or avoided by `unimax`."""
    unit: Literal["bytes", "tokens"] = "bytes"
    """What the shares are shares of. In bytes, a poor tokenizer does not buy a language more text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A byte-level BPE: trained for the experiment with `model.vocab_size` entries, or read from a file."""

    path: str | None = None
    """A tokenizer.json below the data root, used as it is; None trains one on the sources."""
    sample_bytes: int = 1_000_000_000
    """Bytes of text on which one is trained, the same number from each language."""
    max_lost_fraction: float = 0.0
    """The largest share of a source's bytes that the tokens may not give back. What is lost costs 8 bits a byte in
    bits per byte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and in which rows."""

    sources: tuple[Source, ...]
    """The text that is trained on."""
    mixture: Mixture = Mixture()
    """How much of each source is read."""
    tokenizer: Tokenizer = Tokenizer()
    """How text becomes tokens."""
    sequence_length: int
    """Tokens in a row, that is, in one training sequence; also of the windows of an evaluation."""
    packing: Literal["concat", "best-fit"] = "concat"
    """Rows are cut out of the documents laid end to end, or filled with whole documents where they fit."""
    long_documents: Literal["continue", "cut"] = "continue"
    """A document longer than a row goes on in further rows of its source, or ends where the row does."""
    loss_at_document_end: bool = True
    """Whether the end-of-document token is learnt as a target."""
    bad_line_fraction: float = 0.001
    """Unreadable lines are set aside in a file; a source with a larger share of them stops the run."""
    max_document_bytes: int = 2**24
    """A longer line or text is set aside with the unreadable lines."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    num_layers: int
    """Number of transformer layers."""
    embed_dim: int
    """Width of the residual stream."""
    num_heads: int
    """Number of query heads."""
    num_kv_heads: int
    """Number of key and value heads; divides num_heads."""
    head_dim: int
    """Width of one head; even, since rotary positions turn pairs."""
    mlp_dim: int
    """Width of the gated feed-forward layer."""
    vocab_size: int
    """Number of tokens in the vocabulary."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm over the head before the rotation."""
    tied_output: bool = False
    """Whether the output projection is the transposed embedding."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream divide it by sqrt(2 num_layers)."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and matrix products; parameters are float32 always."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but matrix products, or each whole layer."""
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    """Layers, and chunks of the loss, in a compiled loop or one by one; auto unrolls on CPU and scans elsewhere."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over tokens: warm-up, then `wsd` (stable, then decay) or `cosine` (decay all the way)."""

    kind: Literal["wsd", "cosine"] = "wsd"
    """wsd holds the peak until the decay begins; cosine decays from the end of the warm-up."""
    peak_learning_rate: float
    """The learning rate after warm-up."""
    warmup_tokens: int = 0
    """Tokens over which the rate rises linearly from 0."""
    decay_tokens: int = 0
    """Tokens at the end of the run over which wsd decays; unused by cosine."""
    decay: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Shape of the decay of wsd."""
    final_fraction: float = 0.0
    """The rate at the end of the run as a fraction of the peak."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Which steps are not applied: never one whose loss or gradient is not finite."""

    deviations: float | None = 6.0
    """Nor one whose loss or gradient norm is so many standard deviations above its running mean; None: any height."""
    window_steps: int = 128
    """Steps that the running mean and deviation are taken over, and before which no step is too high."""
    max_skipped: int = 8
    """More steps than these that are not applied, of the last `window_steps`, or most of all steps, are too many."""
    max_returns: int = 0
    """How often the run, where there are too many, goes back to the checkpoint before them and on without their rows;
    then, or where it is 0, it ends. Where it is not, one or two more checkpoints are kept, to go back to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How long, in what batches and by which optimizer."""

    tokens: int
    """Tokens that the run reads in all: rows times sequence length."""
    batch_tokens: int
    """Tokens in one step over all devices; a multiple of the sequence length."""
    schedule: Schedule
    """The learning rate."""
    accumulation_steps: int = 1
    """Parts into which a batch is cut to save memory; the gradient is that of the whole batch."""
    adam_beta1: float = 0.9
    """Decay of the first moment of AdamW."""
    adam_beta2: float = 0.95
    """Decay of the second moment of AdamW."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, on matrices only."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser in the objective; the reported loss is without it."""
    loss_chunk_entries: int = 8192
    """Entries of the vocabulary whose logits exist at one time, if so many divide it."""
    guard: Guard = Guard()
    """Which steps are not applied."""
    seed: int = 0
    """Seeds the parameters and the order of rows."""
    deterministic: bool = False
    """On GPU: choose kernels whose results repeat bit for bit. CPU and TPU repeat always."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A change of the mixture, the rows or the batch at some point of the run; what is None stays as it was."""

    from_tokens: int
    """Tokens read before the stage begins, rounded up to whole rows."""
    mixture: Mixture | None = None
    """How much of each source is read from here on."""
    sequence_length: int | None = None
    """Tokens in a row from here on."""
    batch_tokens: int | None = None
    """Tokens in one step from here on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """A stage as it is carried out: everything filled in, and the rows that it covers."""

    number: int
    """0 for what the experiment begins with, then one for each of `stages`."""
    mixture: Mixture
    """How much of each source it reads."""
    sequence_length: int
    """Tokens in a row."""
    batch_rows: int
    """Rows in one step over all devices."""
    first_row: int
    """Rows of the run before it."""
    stop_row: int
    """Rows of the run until its end."""
    first_token: int
    """Tokens of the run before it."""

    @property
    def num_steps(self) -> int:
        """Steps of the stage when nothing interrupts it; its last batch may be cut short and masked."""
        return -(-(self.stop_row - self.first_row) // self.batch_rows)

    def tokens_at(self, row: int) -> int:
        """Tokens of the run before a row of the stage."""
        return self.first_token + (row - self.first_row) * self.sequence_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How devices are arranged; -1, at most once, stands for what is left."""

    replica: int = 1
    """Copies of the parameters behind a slow network, between slices or islands: gradients cross it once a step."""
    data: int = -1
    """Devices that hold copies of the parameters and split the batch."""
    fsdp: int = 1
    """Devices that split the parameters and the batch."""
    sequence: int = 1
    """Devices that split the parameters and the length of rows."""
    tensor: int = 1
    """Devices that split heads, feed-forward width and vocabulary, and the length of rows between blocks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the state is saved and what is kept."""

    every_steps: int = 500
    """Steps between two saves; the last step is saved always."""
    keep_last: int = 2
    """Number of latest checkpoints to keep; two at least, since the last one may be harmed."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this step count are kept for good."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What bits per byte are measured on, besides the held-out share of each source."""

    sources: tuple[Source, ...] = ()
    """Text that is evaluated on and not trained on."""
    every_steps: int = 500
    """Steps between two evaluations; the untrained and the finished model are evaluated always."""
    max_documents: int | None = 1000
    """Documents read of each source, its first ones; None reads all."""
    sample_tokens: int = 48
    """Tokens that the finished model writes after the beginning of a held-out text in each language; 0 writes none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A pretraining run as one value."""

    name: str = ""
    """Name of the run and of its folder; the stem of the file where none is given."""
    continue_from: str | None = None
    """A Hugging Face folder below the data root whose weights the run begins with; None draws random ones."""
    model: Model
    """The network."""
    data: Data
    """What it reads."""
    training: Training
    """How it is trained."""
    stages: tuple[Stage, ...] = ()
    """Changes of mixture, row length or batch in the course of it, in order."""
    mesh: Mesh = Mesh()
    """How devices are arranged."""
    checkpoint: Checkpoint = Checkpoint()
    """When it is saved."""
    evaluation: Evaluation = Evaluation()
    """What it is measured on."""

    @property
    def tokenizer_path(self) -> str | None:
        """The tokenizer.json below the data root, declared or that of `continue_from`; None where one is trained."""
        if self.data.tokenizer.path is None and self.continue_from is not None:
            return f"{self.continue_from}/tokenizer.json"
        return self.data.tokenizer.path

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """The stages as they are carried out, the beginning of the run the first of them; they follow one another."""
        now = Stage(
            from_tokens=0,
            mixture=self.data.mixture,
            sequence_length=self.data.sequence_length,
            batch_tokens=self.training.batch_tokens,
        )
        ends = [*(stage.from_tokens for stage in self.stages), self.training.tokens]
        spans: list[Span] = []
        row = token = 0
        for number, end in enumerate(ends):
            if number:
                later = self.stages[number - 1]
                changes = {name: value for name, value in vars(later).items() if value is not None}
                now = dataclasses.replace(now, **changes)
            length = now.sequence_length or 1
            stop = row + max(0, -(-(end - token) // length))
            spans.append(
                Span(
                    number=number,
                    mixture=now.mixture or self.data.mixture,
                    sequence_length=length,
                    batch_rows=(now.batch_tokens or 0) // length,
                    first_row=row,
                    stop_row=stop,
                    first_token=token,
                )
            )
            row, token = stop, spans[-1].tokens_at(stop)
        return tuple(spans)

    def span_at(self, position: int) -> Span:
        """The stage in which row `position` of the run lies; the last one for the end of the run."""
        return next((span for span in self.spans if position < span.stop_row), self.spans[-1])

    def tokens_at(self, position: int) -> int:
        """Tokens of the run before row `position`, padding counted: the clock of schedules."""
        return self.span_at(position).tokens_at(position)

    @property
    def batch_rows(self) -> int:
        """Rows in one step over all devices at the beginning of the run."""
        return self.spans[0].batch_rows

    @property
    def context_length(self) -> int:
        """The most tokens that the model sees at once: those of the longest row."""
        return max(span.sequence_length for span in self.spans)

    @property
    def total_rows(self) -> int:
        """Rows of the whole run: its tokens rounded up to whole rows in each stage."""
        return self.spans[-1].stop_row

    @property
    def total_tokens(self) -> int:
        """Tokens of all rows of the run."""
        return self.tokens_at(self.total_rows)

    @property
    def total_steps(self) -> int:
        """Steps of an uninterrupted run; the last batch of a stage may be cut short and masked."""
        return sum(span.num_steps for span in self.spans)

    @property
    def language_codes(self) -> tuple[str, ...]:
        """The languages trained or evaluated on, sorted; a position in this tuple is a language id."""
        sources = self.data.sources + self.evaluation.sources
        return tuple(sorted({languages.fold(s.language) or s.language for s in sources}))
