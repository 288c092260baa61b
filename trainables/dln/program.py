"""What a trial of the dln family is made of: its program (shapes and code), its hypers (one lane's numbers), checks."""

from __future__ import annotations

from dataclasses import dataclass

from trainables.datasets.text import vocabulary
from trainables.family import BadValue, Schedule

IMAGE_SIDES = {"digits": 8, "mnist": 28}
"""Image data sets for reconstruction -> pixels along one side."""


@dataclass(frozen=True)
class Program:
    """Everything that decides shapes or code.

    Args:
        data: "pydoc", "shakespeare", "wikitext2" or a text file's path; for `task="reconstruct"` "digits" or "mnist".
        precision: "float32", "float64" or "bf16".
        autocast: "none", or "float16": matrix products in half precision without loss scaling (needs precision
            float32; bfloat16 is precision "bf16").
        task: "gpt" (transformer language model), "tdln" (recurrent language model) or "reconstruct" (read an image
            pixel by pixel, give the whole image back from the last state).
        batch: windows or images a step.
        length: tokens a window (steps of the recurrence); a reconstruction reads all pixels.
        steps_per_epoch: updates between two evaluations.
        epochs: evaluations in a run.
        eval_windows: held-out windows (or images) per evaluation, the same ones each time; 0 = all of them.
        eval_batch: how many of them at once.
        lower: lower-case the text.
        windows: training windows start anywhere ("random"), behind a blank line ("breaks": where a speaker begins), or
            are the first `fixed_windows` of the text, end to end ("fixed": memorisation).
        without_digit: leave this digit out of the training images; -1 keeps all.

        layers, width, heads: transformer blocks, residual width, attention heads.
        head_width: channels a head; 0 = width / heads.
        mlp: "mlp" (down(f(up x))) or "gate" (ComputeGate: down(g(gate x) * (up x))).
        hidden: hidden units of the MLP (of each half of a gate); 0 = 4 * width.
        activation: see `.activations`; of a gate, what its gate half goes through.
        norm: "rms" (RMSNorm) or "layer" (LayerNorm without bias).
        norm_gain: the norms have a learned gain.
        norm_over: "position", or "sequence" as some originals had it by mistake: one statistic over all positions and
            channels of a window, which shows every position its future.
        final_norm: a norm before the unembedding.
        qkv: "split" (one matrix for q and k, one for v) or "joint".
        qk_norm: "none", "plain" (LayerNorm of each head's q and k without weights) or "gain" (with a learned gain).
        positions: "learned" (added to the embedding), "rope" (rotary) or "none".
        memory: channels of a real diagonal recurrence whose output is put beside the attention's input; 0 = none.
        skip: "standard", or "double" as the original coded it: hidden + Block(hidden), where Block already adds its
            own residuals.
        unembedding: "tied" (the embedding's transpose), "tied_at_start" (a copy that drifts apart, as the original) or
            "free".
        dropout_at: any of "embedding", "attention" (probabilities), "combine" (attention's output), "mlp", "memory";
            () leaves dropout out of the code.
        decayed: what decoupled weight decay touches: "matrices" (of the blocks), "matrices+embeddings" (every matrix,
            nanoGPT's rule) or "all".
        init: distribution of the initial weights, "truncated" (normal, cut at 2 sd; JAX's initialisers) or "normal".

        channels: D, the size of the recurrent memory of the "tdln" and "reconstruct" tasks.
        recurrence: "dln" (constant decays), "tdln" (input-dependent time steps) or "tdln_shifted" (its first version:
            no data projection, gate shifted by one step, and behind a plain DLN where levels > 0).
        levels: recurrent levels after the first.
        residual: the levels (and dense layers) add their input: the "highway".
        dense: dense layers on the last state of a reconstruction.
        freeze: how a fixed memory is kept: "mask" (its learning rate is `train_memory` times the others', a lane
            number) or "detach" (no gradient reaches it, whatever `train_memory` says).
        targets: what the recurrent language model reads and predicts: "softmax" (token ids), "bits" (eight a byte) or
            "real" (byte / 255).
        loss: "ce" for softmax, "bce" or "mse" for the others.
        bytes_per_step: bytes that bits and real targets take a step.
        target: "next", or "next_row" as the original's indexing mistake x[:][1:]: the next ROW of the batch at the
            same position. Evaluation always asks for the next token.
    """

    data: str = "pydoc"
    precision: str = "float32"
    autocast: str = "none"
    task: str = "gpt"
    batch: int = 64
    length: int = 256
    steps_per_epoch: int = 250
    epochs: int = 10
    eval_windows: int = 0
    eval_batch: int = 64
    lower: bool = False
    windows: str = "random"
    fixed_windows: int = 1
    without_digit: int = -1
    # transformer
    layers: int = 6
    width: int = 384
    heads: int = 6
    head_width: int = 0
    mlp: str = "mlp"
    hidden: int = 0
    activation: str = "gelu_tanh"
    norm: str = "rms"
    norm_gain: bool = False
    norm_over: str = "position"
    final_norm: bool = False
    qkv: str = "split"
    qk_norm: str = "plain"
    positions: str = "learned"
    memory: int = 0
    skip: str = "standard"
    unembedding: str = "tied_at_start"
    dropout_at: tuple[str, ...] = ("attention", "combine", "mlp")
    decayed: str = "matrices"
    init: str = "truncated"
    # recurrences
    channels: int = 500
    recurrence: str = "tdln"
    levels: int = 0
    residual: bool = True
    dense: int = 1
    freeze: str = "mask"
    targets: str = "softmax"
    loss: str = "ce"
    bytes_per_step: int = 1
    target: str = "next"


@dataclass(frozen=True)
class Hyper:
    """The numbers of one lane.

    Args:
        lr: peak learning rate. warmup: steps of linear rise from 0. decay_steps: step at which the cosine ends (warm-up
            included). final_fraction: the learning rate from there on, as a fraction of lr (1 = constant).
        b1, b2: Adam's decays. weight_decay: decoupled rate. clip: largest gradient norm of the lane, 0 = no clipping.
        dropout: rate. norm_eps: added to the mean square (variance) of every norm.
        attention_scale: times 1 / sqrt(head width). window: positions that attention sees, itself included; 0 = all.
        act_a, act_b: coefficients of the activations that have them.

        matrix_scale: of all initial matrices of the blocks; qkv_scale, qk_scale, v_scale, combine_scale (attention's
            output), up_scale (gate included), down_scale: of these, on top.
        qkv_average, combine_average, up_average, down_average: 1 divides by the mean of fan-in and fan-out (Glorot), 0
            by the fan-in. fan_power: the divisor is that fan to this power: .5 as usual, 0 for a plain normal.
        embedding_scale: standard deviation of the embedding times sqrt(width); unembedding_scale: the same of a free
            one; positional_scale: of Glorot's.

        decay_low, decay_high: initial decays of the memory beside attention, uniform between them.
        state_returned: 1 reads the memory's state; 0 what the original returned by mistake, the product of the decays.

        forget_low, forget_high: 1 - size of the recurrent memory, log-uniform between them. period: the longest
            initial period in steps; theta is log-uniform from 2 pi / period to 2 pi. time_bias: added before the
            sigmoid of the time step (1000: every step is 1). train_memory: 1 trains size and theta, 0 keeps them;
            train_first: the same for all of the first level.
    """

    lr: float = 1e-3
    warmup: float = 100.0
    decay_steps: float = 5000.0
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.1
    clip: float = 1.0
    dropout: float = 0.2
    norm_eps: float = 1e-6
    attention_scale: float = 1.0
    window: float = 0.0
    act_a: float = 1.0
    act_b: float = 1.0
    matrix_scale: float = 1.0
    qkv_scale: float = 1.0
    qk_scale: float = 0.1
    v_scale: float = 0.01
    combine_scale: float = 1.0
    up_scale: float = 1.0
    down_scale: float = 1.0
    qkv_average: float = 1.0
    combine_average: float = 1.0
    up_average: float = 1.0
    down_average: float = 1.0
    fan_power: float = 0.5
    embedding_scale: float = 0.03
    unembedding_scale: float = 1.0
    positional_scale: float = 1.0
    decay_low: float = 0.95
    decay_high: float = 0.999
    state_returned: float = 1.0
    forget_low: float = 1e-4
    forget_high: float = 1e-3
    period: float = 1000.0
    time_bias: float = 0.0
    train_memory: float = 1.0
    train_first: float = 1.0


_CHOICES = {
    "task": ("gpt", "tdln", "reconstruct"),
    "autocast": ("none", "float16"),
    "windows": ("random", "breaks", "fixed"),
    "mlp": ("mlp", "gate"),
    "activation": (
        "gelu",
        "gelu_tanh",
        "relu",
        "silu",
        "tanh",
        "sigmoid",
        "identity",
        "leaky",
        "shrink",
        "shrink_sigmoid",
    ),
    "norm": ("rms", "layer"),
    "norm_over": ("position", "sequence"),
    "qkv": ("split", "joint"),
    "qk_norm": ("none", "plain", "gain"),
    "positions": ("learned", "rope", "none"),
    "skip": ("standard", "double"),
    "unembedding": ("tied", "tied_at_start", "free"),
    "decayed": ("matrices", "matrices+embeddings", "all"),
    "init": ("truncated", "normal"),
    "recurrence": ("dln", "tdln", "tdln_shifted"),
    "freeze": ("mask", "detach"),
    "targets": ("softmax", "bits", "real"),
    "target": ("next", "next_row"),
    "loss": ("ce", "bce", "mse"),
}
_POSITIVE = (
    "batch",
    "length",
    "steps_per_epoch",
    "epochs",
    "eval_batch",
    "fixed_windows",
    "layers",
    "width",
    "heads",
    "channels",
    "bytes_per_step",
)
_NOT_NEGATIVE = ("eval_windows", "head_width", "hidden", "memory", "levels", "dense")
DROPOUT_PLACES = ("embedding", "attention", "combine", "mlp", "memory")


def validate(program: Program) -> None:
    """Raises `BadValue` in one line where a field is out of its range or two contradict one another."""
    for name, allowed in _CHOICES.items():
        if getattr(program, name) not in allowed:
            raise BadValue(f"{name} '{getattr(program, name)}' is not one of {', '.join(allowed)}")
    for names, least in ((_POSITIVE, 1), (_NOT_NEGATIVE, 0)):
        for name in names:
            if getattr(program, name) < least:
                raise BadValue(f"{name} = {getattr(program, name)} should be at least {least}")
    if program.autocast == "float16" and program.precision != "float32":
        raise BadValue(f"autocast float16 needs precision float32, not {program.precision}")
    images = program.data in IMAGE_SIDES
    if images != (program.task == "reconstruct"):
        texts = "a text (pydoc, shakespeare, wikitext2 or a path)"
        wanted = f"images ({' or '.join(IMAGE_SIDES)})" if program.task == "reconstruct" else texts
        raise BadValue(f"task '{program.task}' needs {wanted}, not data '{program.data}'")
    if program.task == "gpt":
        _validate_transformer(program)
    if program.task == "tdln":
        allowed_losses = ("ce",) if program.targets == "softmax" else ("bce", "mse")
        if program.loss not in allowed_losses:
            raise BadValue(
                f"targets '{program.targets}' go with loss {' or '.join(allowed_losses)}, not {program.loss}"
            )
        if program.targets == "softmax" and program.bytes_per_step != 1:
            raise BadValue("softmax targets take one byte a step: bytes_per_step must be 1")
        if program.target == "next_row" and program.batch < 2:
            raise BadValue("target next_row needs a batch of at least 2")
    if not -1 <= program.without_digit <= 9:
        raise BadValue(f"without_digit = {program.without_digit} should be a digit, or -1 for none")


def _validate_transformer(program: Program) -> None:
    for place in program.dropout_at:
        if place not in DROPOUT_PLACES:
            raise BadValue(f"dropout_at '{place}' is not one of {', '.join(DROPOUT_PLACES)}")
    if program.head_width == 0 and program.width % program.heads:
        raise BadValue(f"width {program.width} does not divide into {program.heads} heads: give head_width")
    if program.positions == "rope" and head_width(program) % 2:
        raise BadValue(f"rope needs an even head width, not {head_width(program)}")
    if program.target != "next":
        raise BadValue("target next_row belongs to the tdln task")


def schedule(program: Program) -> Schedule:
    """`epochs` evaluations, `steps_per_epoch` updates apart; one task."""
    return Schedule(program.steps_per_epoch, program.epochs, program.epochs)


def head_width(program: Program) -> int:
    return program.head_width or program.width // program.heads


def hidden_units(program: Program) -> int:
    return program.hidden or 4 * program.width


def vocabulary_size(program: Program) -> int:
    return len(vocabulary(program.data, program.lower))


def pixels(program: Program) -> int:
    return IMAGE_SIDES[program.data] ** 2


def features(program: Program) -> int:
    """Numbers that the recurrent model reads and predicts a step."""
    if program.task == "reconstruct":
        return 1
    return {"softmax": vocabulary_size(program), "bits": 8 * program.bytes_per_step, "real": program.bytes_per_step}[
        program.targets
    ]
