"""Every key of a recipe: its type, bounds and default. The defaults are starting points for small data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, Tag, model_validator
from pydantic_core import PydanticCustomError

from contrastive.config.block import Block, PathText, Positive, Share, at_home, kind_of
from contrastive.config.combinations import impossible_combinations
from contrastive.config.curriculum import StageConfig
from contrastive.config.losses import InfoNCEConfig, LossConfig
from contrastive.config.spans import period, place, warmup_span


def _sets(value: Any) -> str | dict[str, int]:
    """A folder of shards, or several with whole numbers as weights."""
    text = "expected a folder of shards (in quotes if it looks like something else), or several with whole numbers "
    text += "as weights, such as {data/a: 1, data/b: 3}"
    if isinstance(value, str) and value:
        return at_home(value)
    if isinstance(value, dict) and value and all(isinstance(folder, str) and folder for folder in value):
        if all(isinstance(w, int) and not isinstance(w, bool) and w >= 1 for w in value.values()):
            return {at_home(folder): weight for folder, weight in value.items()}
    raise PydanticCustomError("sets", "{text}", {"text": text})


def _targets(value: Any) -> str | tuple[str, ...]:
    """`auto`, or names of modules."""
    if value == "auto":
        return "auto"
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    text = "expected auto, or a list of names of modules as they end, such as [qkv, mlp.fc1]"
    raise PydanticCustomError("targets", "{text}", {"text": text})


Channels = Annotated[tuple[float, float, float], Field(strict=False)]


class RunConfig(Block):
    """Where the results go, and the seed that everything random is drawn from."""

    dir: PathText = Field("runs/unnamed", min_length=1, description="run folder (default: runs/ and the recipe's name)")
    seed: int = Field(0, ge=0, description="weights, order and augmentation are a function of it")


class LoraConfig(Block):
    """Low-rank adapters on a tower that is locked otherwise (peft)."""

    rank: int = Field(8, ge=1, description="of the product that is added to a layer's weight")
    alpha: Positive = Field(16.0, description="the product is multiplied with alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, on what the adapters read")
    targets: Annotated[str | tuple[str, ...], PlainValidator(_targets)] = Field(
        "auto",
        description="names of modules as they end; auto: all linear maps, or all convolutions where there is none",
    )


class TowerConfig(Block):
    """How a tower is trained."""

    locked: bool = Field(False, description="keep the tower's weights as they are")
    unfreeze_at: Annotated[int | str, PlainValidator(place)] | None = Field(
        None, description="locked until then: steps, or 10% of the run, 1 epoch, 50000 samples; null: never locked"
    )
    lr_scale: Positive = Field(1.0, description="times optim.lr")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="the rate falls by this factor from a layer to the one below, from the projection"
    )
    lora: LoraConfig | None = Field(None, description="learn adapters in place of the tower's own weights; null: none")


class ImageTowerConfig(TowerConfig):
    """How an image tower is trained."""

    patch_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of an image's patches that training leaves out (vision transformers)"
    )


class TimmImageConfig(ImageTowerConfig):
    """An image tower from timm."""

    kind: Literal["timm"] = "timm"
    name: str = Field("resnet18", min_length=1, description="timm's name of the model")
    size: int = Field(48, ge=1, description="side of the square image, pixels")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="more keywords for timm.create_model")
    weights: PathText | None = Field(None, description="a checkpoint file to start from")
    mean: Channels = Field((0.5, 0.5, 0.5), description="subtracted from each channel (0 to 1)")
    std: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] = Field(
        (0.5, 0.5, 0.5), description="each channel is divided by it"
    )
    resize_mode: Literal["shortest", "longest", "squash"] = Field(
        "shortest",
        description="pictures in evaluation and use: shortest cuts the centre out, longest fills what is left, squash "
        "changes the aspect ratio",
    )
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="of pictures in evaluation and use")
    fill_color: int = Field(0, ge=0, le=255, description="grey level around pictures of resize_mode longest")


class TransformerTextConfig(TowerConfig):
    """A text transformer of the given size; depth 0 is a bag of word embeddings."""

    kind: Literal["transformer"] = "transformer"
    width: int = Field(256, ge=1, description="features per token")
    depth: int = Field(1, ge=0, description="layers")
    heads: int = Field(4, ge=1, description="attention heads; divides width")
    pool: Literal["mean", "end"] = Field("mean", description="end: the last real token (needs causal: true)")
    causal: bool = Field(False, description="a token sees only what stands before it")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability")


class HuggingFaceTextConfig(TowerConfig):
    """A text encoder from a local Hugging Face folder."""

    kind: Literal["huggingface"] = "huggingface"
    path: PathText = Field(min_length=1, description="the local folder")
    pool: Literal["mean", "cls"] = Field("mean", description="mean of the tokens, or the first one")


class TrainedTokenizerConfig(Block):
    """A tokenizer trained on the corpus: its table is as small as the corpus allows."""

    kind: Literal["trained"] = "trained"
    path: PathText | None = Field(None, description="a trained tokenizer; null: train one on data.train at the start")
    vocab_size: int = Field(8000, ge=16, description="rows of the embedding table, at most")
    lowercase: bool = Field(True, description="captions in lower case")
    context: int = Field(32, ge=2, description="tokens that are kept of a caption")


class OpenClipTokenizerConfig(Block):
    """open_clip's byte-pair encoding, 49,408 rows."""

    kind: Literal["open_clip"] = "open_clip"
    context: int = Field(77, ge=2, description="tokens that are kept of a caption")


class HuggingFaceTokenizerConfig(Block):
    """The tokenizer of a local Hugging Face folder."""

    kind: Literal["huggingface"] = "huggingface"
    path: PathText = Field(min_length=1, description="the local folder")
    context: int = Field(64, ge=2, description="tokens that are kept of a caption")


class LogitScaleConfig(Block):
    """The factor on the cosine similarities, 1 / temperature."""

    init: Positive = Field(14.2857, description="start; CLIP's is 1 / 0.07")
    max: Positive = Field(100.0, description="cap")
    learned: bool = Field(True, description="train it")


TextConfig = Annotated[
    Annotated[TransformerTextConfig, Tag("transformer")] | Annotated[HuggingFaceTextConfig, Tag("huggingface")],
    kind_of("model.text"),
]
TokenizerConfig = Annotated[
    Annotated[TrainedTokenizerConfig, Tag("trained")]
    | Annotated[OpenClipTokenizerConfig, Tag("open_clip")]
    | Annotated[HuggingFaceTokenizerConfig, Tag("huggingface")],
    kind_of("model.tokenizer"),
]


class PairModelConfig(Block):
    """Two towers, each chosen on its own."""

    kind: Literal["pair"] = "pair"
    image: TimmImageConfig = TimmImageConfig()
    text: TextConfig = TransformerTextConfig()
    tokenizer: TokenizerConfig = TrainedTokenizerConfig()
    dim: int = Field(256, ge=1, description="of the joint embedding")
    logit_scale: LogitScaleConfig = LogitScaleConfig()
    logit_bias: float | None = Field(None, description="start of a learned bias on the logits")


class OpenClipModelConfig(Block):
    """A model of open_clip by its name, or by a JSON file in its format."""

    kind: Literal["open_clip"] = "open_clip"
    name: PathText = Field(min_length=1, description="open_clip's name of the model, or the path of a JSON")
    pretrained: PathText | None = Field(None, description="open_clip's tag of the weights, or a checkpoint file")
    image: ImageTowerConfig = ImageTowerConfig()
    text: TowerConfig = TowerConfig()
    logit_scale: LogitScaleConfig = LogitScaleConfig()
    logit_bias: float | None = Field(None, description="start of a learned bias on the logits")


class SavedScaleConfig(Block):
    """The logit scale of a saved model."""

    init: Positive | None = Field(None, description="start; null: as saved")
    max: Positive | None = Field(None, description="cap; null: as saved")
    learned: bool = Field(True, description="train it")


class FolderModelConfig(Block):
    """A saved model to start from: its architecture, weights and tokenizer."""

    kind: Literal["folder"] = "folder"
    path: PathText = Field(min_length=1, description="a run folder or a model folder")
    image: ImageTowerConfig = ImageTowerConfig()
    text: TowerConfig = TowerConfig()
    logit_scale: SavedScaleConfig = SavedScaleConfig()
    logit_bias: float | None = Field(None, description="start of a learned bias on the logits; null: as saved")


ModelConfig = Annotated[
    Annotated[PairModelConfig, Tag("pair")]
    | Annotated[OpenClipModelConfig, Tag("open_clip")]
    | Annotated[FolderModelConfig, Tag("folder")],
    kind_of("model"),
]


class AugmentConfig(Block):
    """Random changes of the training images."""

    crop: Annotated[tuple[Share, Share], Field(strict=False)] = Field((0.5, 1.0), description="area share, from and to")
    ratio: float = Field(1.3333, ge=1, description="largest aspect ratio of a crop, either way")
    flip: Share = Field(0.0, description="probability of a mirror image (never where captions say left or right)")
    rotate: float = Field(0.0, ge=0, le=180, description="degrees, either way")
    color: Share = Field(0.0, description="strength of the change of brightness, contrast and saturation")
    grayscale: Share = Field(0.0, description="probability")
    tint: Share = Field(0.0, description="probability of a factor per channel, which colours a white background")


class DataConfig(Block):
    """The shards and how they are read."""

    train: Annotated[str | dict[str, int], PlainValidator(_sets)] = Field(
        description="the folder of the training shards, or several with their weights: {data/a: 1, data/b: 3}"
    )
    validation: PathText | None = Field(None, description="the folder of the validation shards")
    window: int | None = Field(
        32, ge=1, description="shards that are shuffled with each other, after the shards themselves; null: all"
    )
    workers: int = Field(1, ge=0, description="loader processes per training process")
    timeout: Positive = Field(
        600.0, description="seconds after which a batch that a worker does not finish ends the run"
    )
    max_skip_rate: Share = Field(
        0.01, description="share of unusable pairs, at the start and in the latest 10,000, that ends the run"
    )
    decode: Literal["exact", "fast"] = Field(
        "exact", description="fast: a JPEG at a reduced scale where that is enough"
    )
    cache: Literal["none", "pixels", "features"] = Field(
        "none",
        description="pixels: decode every image once, beside the shards (images of one size only); "
        "features: run the towers once (both locked, no augmentation)",
    )
    features: PathText | None = Field(
        None,
        min_length=1,
        description="the folder that keeps features of teachers and of locked towers; null: features, beside run.dir",
    )
    compiled: Literal["auto", True, False] = Field(
        "auto",
        description="colours, and crops of cached pixels, by code that is compiled for this machine (once, a second, "
        "wants a C compiler, and AVX2): the same pixels, faster; auto: where that is possible",
    )
    caption_variants: Share = Field(0.0, description="probability of drawing one of a sample's further captions")
    augment: AugmentConfig = AugmentConfig()

    @property
    def train_sets(self) -> dict[str, int]:
        """The folders of the training shards with their weights; one alone weighs 1."""
        return {self.train: 1} if isinstance(self.train, str) else self.train


class EMAConfig(Block):
    """A running average of the weights, which is validated and is the final model."""

    decay: float = Field(0.999, gt=0, lt=1, description="per step; it remembers about 1 / (1 - decay) steps")
    every: int = Field(1, ge=1, description="steps from one update to the next, which takes decay ** every")


class OptimConfig(Block):
    """AdamW and its schedule."""

    lr: Positive = Field(1e-3, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="not on norms, biases and the logit scale")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = (0.9, 0.98)
    eps: Positive = 1e-8
    warmup: Annotated[int | str, PlainValidator(warmup_span)] = Field("5%", description="steps, or a share of the run")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    clip: Positive | None = Field(1.0, description="largest norm of the gradient; null: no clipping")
    ema: EMAConfig | None = Field(None, description="{decay: 0.999, every: 1}; null: no average of the weights")
    max_skipped: int = Field(
        20, ge=1, description="steps in a row whose gradient is not finite, and which change nothing, that stop the run"
    )


class TrainConfig(Block):
    """How long, how large, how precise. Exactly one of steps, samples, epochs, minutes."""

    steps: int | None = Field(None, ge=1)
    samples: int | None = Field(None, ge=1)
    epochs: Positive | None = None
    minutes: Positive | None = None
    global_batch: int = Field(512, ge=2, description="samples a step, over all processes")
    curriculum: Annotated[tuple[StageConfig, ...], Field(strict=False)] = Field(
        (), description="stages before the recipe's own size, context and patch_dropout, in their order"
    )
    unmasked_tail: Annotated[int | str, PlainValidator(period)] | None = Field(
        None, description="the last part of the run in which no patch is left out: 5%, or steps, 1 epoch, 10m"
    )
    chunk: int | None = Field(
        None,
        ge=1,
        description="pairs that a process puts through the towers at once; null: all. Less memory, up to 1.3 times "
        "the time, the same gradient (GradCache)",
    )
    fused_loss: bool = Field(
        False,
        description="compile the tiles of a softmax loss for this CPU (once, ten seconds, wants a C++ compiler and "
        "ninja): a loss of large batches takes about a tenth less time, with the same gradient to rounding",
    )
    compile: Literal["none", "towers"] = Field(
        "none",
        description="towers: both through torch.compile in training (a minute or more at the start and for each new "
        "size, wants a C++ compiler on a CPU), with the same loss to rounding",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto: bf16 where supported")
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="fsdp: a process keeps a share of weights, gradients and moments (FSDP2); none: all of them (DDP)",
    )
    gradient_checkpointing: bool = Field(False, description="less memory, more time")
    channels_last: bool = Field(True, description="memory layout of the image tower")
    threads: int | None = Field(None, ge=1, description="torch threads per process; null: torch's choice")
    step_timeout: Positive | None = Field(
        1800.0,
        description="seconds after which a process whose step does not end writes its stacks and ends; null: never",
    )


class CheckpointConfig(Block):
    """Saves to resume from."""

    every: Annotated[int | str, PlainValidator(period)] | None = Field(
        500, description="steps, or 10m, 1 epoch, 50000 samples, 5% of the run; null: only at the end"
    )
    keep: int = Field(2, ge=1, description="the newest ones that are kept")
    keep_every: int | None = Field(None, ge=1, description="those of every so many steps are kept too")
    keep_best: str | None = Field(
        None,
        min_length=1,
        description="a number of the validation, such as zeroshot/top1: the best one's checkpoint is kept too",
    )


class LabelledSetConfig(Block):
    """A labelled set for zero-shot classification and the linear probe at the end of the run."""

    name: str = Field(min_length=1, description="its name in the results")
    train: PathText | None = Field(None, description="the training split; the probe needs it")
    test: PathText = Field(min_length=1, description="the test split")
    invert: bool = Field(False, description="invert the pixels: a white object on black becomes black on white")
    templates: PathText = Field("none", min_length=1, description="a built-in set, a file of templates, or none")
    tasks: Annotated[tuple[Literal["zeroshot", "probe"], ...], Field(strict=False, min_length=1)] = (
        "zeroshot",
        "probe",
    )


class StopConfig(Block):
    """Ends the run when its validation no longer improves."""

    metric: str = Field("zeroshot/top1", min_length=1, description="a number of the validation")
    patience: int = Field(3, ge=1, description="validations in a row without an improvement that end the run")
    min_delta: float = Field(0.0, ge=0, description="an improvement is more than this")
    mode: Literal["auto", "max", "min"] = Field(
        "auto", description="which is better; auto: min where the name holds loss, error or rank"
    )


class EvalConfig(Block):
    """Evaluation during the run and at its end."""

    every: Annotated[int | str, PlainValidator(period)] | None = Field(
        None, description="steps, or 10m, 1 epoch, 50000 samples, 5% of the run; null: only at the end"
    )
    labelled: Annotated[tuple[LabelledSetConfig, ...], Field(strict=False)] = ()
    report: bool = Field(True, description="write report.html at the end")
    stop: StopConfig | None = Field(
        None, description="{metric: zeroshot/top1, patience: 3}; null: the run has its whole length"
    )


class TrackConfig(Block):
    """Where the curves go, beside metrics.jsonl."""

    # `with` is a keyword of Python, so the attribute has a name of its own.
    trackers: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        ("tensorboard",), alias="with", description="accelerate's names of trackers"
    )
    log_every: int = Field(10, ge=1, description="steps")
    probe: int | None = Field(
        256,
        ge=2,
        description="pairs of data.validation, the same in every run, whose loss without augmentation is logged as "
        "probe/loss, to compare batch sizes by; null: none",
    )
    probe_every: Annotated[int | str, PlainValidator(period)] = Field(
        "5%", description="steps, or 10m, 1 epoch, 50000 samples, 5% of the run"
    )
    mfu: bool = Field(
        False, description="log the share of this machine's peak (measured for half a second at the start) as train/mfu"
    )


class Config(Block):
    """A whole recipe."""

    run: RunConfig = RunConfig()
    model: ModelConfig = PairModelConfig()
    data: DataConfig
    loss: LossConfig = InfoNCEConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _possible(self) -> Config:
        found = list(impossible_combinations(self))
        if found:
            text = "\n".join(message for _, message in found)
            raise PydanticCustomError("combinations", "{text}", {"text": text, "found": found})
        return self
