"""Settings that accelerate takes from the environment: none of them may change a run without its recipe.

``accelerate launch`` sets these variables from its options and from a configuration file of the user's, and a shell may
have them from another project. Each variable that accelerate reads has its row here; a test compares the table with
accelerate's source.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from contrastive.errors import UserError

OFF = frozenset(("", "0", "false", "f", "no", "n", "off", "none"))


@dataclass(frozen=True)
class Refused:
    """A variable that would change gradients, names of weights or the devices of a run.

    remedy: the key of a recipe, or another way. off: values, in lower case, with which it changes nothing.
    """

    remedy: str
    off: frozenset[str] = OFF


@dataclass(frozen=True)
class Harmless:
    """A variable that cannot change a run, with the reason."""

    why: str


_SHARDING = "train.sharding: fsdp keeps weights in shares"
_PLACE = Harmless("which processes there are, on what")
_UNUSED = Harmless("read only with a plugin whose own variable is refused")
_TRACKER = Harmless("read by a tracker, names only")
_OTHER_MACHINES = Harmless("of hardware that is not trained on here")

# A name that ends in * is the beginning of many.
SETTINGS: Mapping[str, Refused | Harmless] = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Refused(
        "train.chunk takes a batch of any size through little memory, with the gradient of the whole", OFF | {"1"}
    ),
    "ACCELERATE_DYNAMO_BACKEND": Refused("train.compile: towers compiles both towers"),
    "ACCELERATE_USE_FSDP": Refused(_SHARDING),
    "ACCELERATE_USE_DEEPSPEED": Refused(_SHARDING),
    "ACCELERATE_USE_MEGATRON_LM": Refused(_SHARDING),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Refused(_SHARDING),
    "ACCELERATE_USE_SAGEMAKER": Refused("start the processes with torchrun"),
    "ACCELERATE_FP8_BACKEND": Refused("train.precision has bf16, fp16 and fp32"),
    "ACCELERATE_TORCH_DEVICE": Refused("CUDA_VISIBLE_DEVICES chooses a GPU", frozenset(("",))),
    "ACCELERATE_MIXED_PRECISION": Harmless("train.precision is given to accelerate, and counts"),
    "ACCELERATE_USE_CPU": Harmless("`build_accelerator` follows it"),
    "ACCELERATE_DYNAMO_*": Harmless("read with a backend only, which is refused"),
    "FSDP_*": _UNUSED,
    "ACCELERATE_DEEPSPEED_*": _UNUSED,
    "ACCELERATE_CONFIG_DS_FIELDS": _UNUSED,
    "ACCELERATE_GRADIENT_CLIPPING": _UNUSED,
    "MEGATRON_LM_*": _UNUSED,
    "PARALLELISM_CONFIG_*": _UNUSED,
    "ACCELERATE_ALLOW_CP_STANDALONE": _UNUSED,
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": _UNUSED,
    "ACCELERATE_FP8_*": Harmless("read with the precision fp8 only, which train.precision does not have"),
    "FP8_*": Harmless("read with the precision fp8 only, which train.precision does not have"),
    "ACCELERATE_BYPASS_DEVICE_MAP": Harmless("read for a model that is spread over devices, which ours is not"),
    "ACCELERATE_INIT_INCLUDE_BUFFERS": Harmless("read when a model is built without weights, which ours is not"),
    "ACCELERATE_CPU_AFFINITY": _PLACE,
    "ACCELERATE_DEBUG_MODE": Harmless("checks shapes before a collective"),
    "ACCELERATE_DEBUG_RDV_FILE": _PLACE,
    "ACCELERATE_ENABLE_RICH": Harmless("colours of a traceback"),
    "ACCELERATE_LOG_LEVEL": Harmless("how much is printed"),
    "RANK": _PLACE,
    "WORLD_SIZE": _PLACE,
    "LOCAL_RANK": _PLACE,
    "LOCAL_WORLD_SIZE": _PLACE,
    "NODE_RANK": _PLACE,
    "NPROC": _PLACE,
    "MASTER_ADDR": _PLACE,
    "MASTER_PORT": _PLACE,
    "OMP_NUM_THREADS": _PLACE,
    "PMI_*": _PLACE,
    "OMPI_COMM_*": _PLACE,
    "MV2_COMM_*": _PLACE,
    "MPI_LOCALRANKID": _PLACE,
    "MPI_LOCALNRANKS": _PLACE,
    "FORK_LAUNCHED": Harmless("set by accelerate's launcher for notebooks"),
    "NCCL_*": Harmless("how NCCL sends, not what"),
    "CLEARML_*": _TRACKER,
    "MLFLOW_*": _TRACKER,
    "AWS_*": Harmless("read to start a job, not in one"),
    "PYTORCH_ENABLE_MPS_FALLBACK": _OTHER_MACHINES,
    "ACCELERATE_DOWNCAST_BF16": _OTHER_MACHINES,
    "XLA_*": _OTHER_MACHINES,
    "USE_TORCH_XLA": _OTHER_MACHINES,
    "PJRT_DEVICE": _OTHER_MACHINES,
    "TPU_NAME": _OTHER_MACHINES,
    "PT_HPU_LAZY_MODE": _OTHER_MACHINES,
    "DEEPSPEED_USE_HPU": _OTHER_MACHINES,
    "systemdrive": _OTHER_MACHINES,
}
# Of torch and its libraries: they change the rounding of a product in float32; a note is printed.
ROUNDING = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")


def setting_of(name: str) -> Refused | Harmless | None:
    """The row of a variable; None for one that the table does not have."""
    if name in SETTINGS:
        return SETTINGS[name]
    found = (row for key, row in SETTINGS.items() if key.endswith("*") and name.startswith(key[:-1]))
    return next(found, None)


def check_launcher_settings(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse settings of the environment that would change a run.

    Raises:
        UserError: one line with the variable, its value and the remedy.
    """
    for name, row in SETTINGS.items():
        value = environ.get(name, "")
        if isinstance(row, Refused) and value.strip().lower() not in row.off:
            raise UserError(
                f"the environment has {name}={value}, set by a launcher or its configuration file, and the recipe does "
                f"not ask for it; unset it ({row.remedy})"
            )


def notes_on_settings(precision: str, on_cpu: bool, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """A line for each setting of the environment that is not followed, or that chooses the device or the rounding.

    precision: of the run: bf16, fp16 or fp32. on_cpu: whether the run is on a CPU although there is an accelerator.
    """
    asked = environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower()
    if asked not in OFF and asked != precision:
        yield f"note: ACCELERATE_MIXED_PRECISION={asked} is not followed; train.precision says {precision}"
    if on_cpu:
        yield "note: this run is on the CPU, as ACCELERATE_USE_CPU says, although there is an accelerator"
    for name in ROUNDING:
        if environ.get(name, "0") != "0":
            yield f"note: {name}={environ[name]} changes the rounding of products in float32"
