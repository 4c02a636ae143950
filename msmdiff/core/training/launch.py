"""How a training starts and is told to stop: devices and processes, precision, signals."""

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed

from msmdiff.core import interrupts, machine
from msmdiff.core.config import Config
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.sections import TrainConfig
from msmdiff.core.training import sharding

T = TypeVar("T")

AUTOCAST_WIDTH = 64
"""From this hidden_size on, bf16 autocast is faster than fp32 on a CPU with bf16 instructions
(docs/benchmarks.md).
"""


def choose_precision(config: Config, device: str) -> Any:
    """`auto` -> bf16 where it is faster: CUDA with bf16, or a CPU with bf16 instructions from
    AUTOCAST_WIDTH on.
    """
    wanted = config.train.precision
    if wanted == "fp16" and device == "cpu":
        raise UsageError("train.precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    wide = (config.model.model_dump().get("hidden_size") or 0) >= AUTOCAST_WIDTH
    can = torch.cpu.get_capabilities()
    return "bf16" if wide and (can.get("avx512_bf16") or can.get("amx_bf16")) else "fp32"


def accelerator(config: Config, run_path: Path) -> Any:
    """One process of however many the launcher started. Raises UsageError for a launch that would
    not work together.
    """
    from accelerate import Accelerator  # takes a second, and only training needs it
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType

    # Accelerate keeps one state per process, which would fix the precision of every later training
    # to the first one's, and forget how to shard a second one.
    AcceleratorState._reset_state()
    if PartialState._shared_state.get("distributed_type") == DistributedType.FSDP:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _refuse_lonely_launch()
    shards = sharding.plugin(config.train.precision)
    cuda = torch.cuda.is_available()
    machine.prepare(config.train.threads)
    machine.repeat_exactly(config.train.deterministic and cuda)
    for tracker in config.train.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UsageError(
                f"train.trackers names {tracker}, which is not installed: pip install {tracker}"
            )
    made = Accelerator(
        cpu=not cuda,
        mixed_precision={"fp32": "no"}.get(config.train.precision, config.train.precision),
        log_with=list(config.train.trackers) or None,
        project_dir=str(run_path),
        step_scheduler_with_optimizer=False,
        fsdp_plugin=shards,
        # Buffers are constants, the same in every process, and a derivative along the flow (jvp)
        # does not allow that they are written.
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=_has_idle(config), broadcast_buffers=False
            )
        ],
    )
    if shards and not made.is_fsdp2:
        raise UsageError(
            "sharding (FSDP) takes processes with a GPU each: start those, or leave out --use_fsdp"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and made.num_processes == 1:
        raise UsageError(
            f"{launched} processes were started but would each train alone: start them with "
            f"`torchrun --nproc_per_node {launched} -m -- msmdiff ...`"
        )
    return made


def _has_idle(config: Config) -> bool:
    """Whether some steps leave parameters without gradients, which DDP must know: a plain pass
    MDT's side block and mask token, and the mask token of a decoder for sparse training.
    """
    plain_mdt = str(config.model.family).startswith("mdt") and config.objective.name == "dsm"
    return plain_mdt or config.model.model_dump().get("sparse") == "decoder"


def first() -> bool:
    """Whether this process is the only one, or the first of those that were started: it reports
    and writes.
    """
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"


def _refuse_lonely_launch() -> None:
    # Where `accelerate launch --cpu --num_processes N` means N processes, it starts one, and leaves
    # only this trace.
    if (
        os.environ.get("ACCELERATE_USE_CPU")
        and "MASTER_PORT" in os.environ
        and "WORLD_SIZE" not in os.environ
    ):
        raise UsageError(
            "`accelerate launch --cpu` starts one process whatever --num_processes says: "
            "use `torchrun --nproc_per_node N -m -- msmdiff ...`"
        )
    world = os.environ.get("WORLD_SIZE", "1")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # srun sets it, and a batch script has none
    if "WORLD_SIZE" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        raise UsageError(
            f"srun started {tasks} tasks, which would each work alone: let each of them start "
            "`torchrun ... -m -- msmdiff ...`, with srun --ntasks-per-node 1"
        )
    if world == "1":
        return
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent or not world.isdecimal():
        missing = f", but no {', '.join(absent)}" if absent else ""
        raise UsageError(
            f"WORLD_SIZE is {world}{missing}: unset it, or start several processes with "
            "`torchrun --nproc_per_node N -m -- msmdiff ...`"
        )


def shares(train: TrainConfig, processes: int) -> tuple[int, int]:
    """Images of a micro-batch, and how many of them a process takes for a step.

    Raises UsageError where the batch does not divide.
    """
    micro = train.micro_batch_size or max(1, train.batch_size // processes)
    if train.batch_size % (micro * processes):
        raise UsageError(
            f"train.batch_size {train.batch_size} does not divide by {processes} processes x "
            f"micro-batches of {micro}"
        )
    return micro, train.batch_size // (micro * processes)


def agree(accelerator: Any, stop: bool) -> bool:
    """Whether any process says so; all must leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return stop
    flag = torch.tensor([float(stop)], device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item())


def from_first(make: Callable[[], T]) -> T:
    """What the first of the launched processes makes, handed to all; the others wait for it, for
    hours if need be. Raises in all of them the MsmdiffError that it raised.
    """
    if not torch.distributed.is_initialized():
        return make()
    made: list[Any] = [None, None]
    if first():
        try:
            made[0] = make()
        except MsmdiffError as error:
            made[1] = error
    # Over gloo, whose waiting costs nothing, and not within the ten minutes that NCCL waits.
    group: Any = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    torch.distributed.broadcast_object_list(made, src=0, group=group)
    torch.distributed.destroy_process_group(group)
    if made[1] is not None:
        raise made[1]
    return made[0]


def process() -> tuple[torch.device, bool]:
    """Where there is no training: this process's device, and whether it reports; joined with others
    of a launch.
    """
    _refuse_lonely_launch()
    machine.prepare()
    cuda = torch.cuda.is_available()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return torch.device("cuda" if cuda else "cpu"), True
    from accelerate import PartialState

    # Statistics of a CPU's features are summed too, and whoever is done early waits for the slowest
    # share.
    state = PartialState(cpu=not cuda, backend="gloo", timeout=timedelta(days=7))
    return state.device, state.is_main_process


def leave() -> None:
    """The end of what `process` began, where several processes were joined."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Signals:
    """While active, SIGINT and SIGTERM only leave a note, so that a step ends before the run is
    saved.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._breaks_off = False

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Here the first signal ends what is done: it can be made again."""
        self._breaks_off = True
        try:
            yield
        except KeyboardInterrupt:
            pass
        finally:
            self._breaks_off = False

    def __enter__(self) -> "Signals":
        try:
            self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, where Python allows no handlers
            self._old = {}
        self._words = interrupts.saying(interrupts.AFTER_THIS_STEP)
        self._words.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._words.__exit__(None, None, None)
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGTERM:
            return  # SLURM and torchrun both send it
        if self.received is not None:
            self._give_back()  # whoever asks a third time does not meet us again
            raise KeyboardInterrupt(interrupts.QUIT)  # asked twice: do not wait for the step
        self.received = number
        if self._breaks_off:
            raise KeyboardInterrupt
