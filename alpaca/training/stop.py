"""On SIGTERM, SIGUSR1 or Ctrl-C, a run finishes its step, saves a checkpoint and exits."""

from __future__ import annotations

import os
import signal
import time

import torch
import transformers

from alpaca.training.checkpoints import RESUME

SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]  # not Windows


class Stopped(Exception):
    """A signal ended the run, which has saved a checkpoint.

    ``code`` is the exit code: 130 for Ctrl-C; else 75, EX_TEMPFAIL of sysexits.h: a scheduler should restart it.
    """

    def __init__(self, number: int, state: transformers.TrainerState):
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {state.global_step} of {state.max_steps}, checkpoint "
            f"saved; to resume, add {RESUME} to the same command"
        )
        self.code = 130 if number == signal.SIGINT else 75


class StopOnSignal(transformers.TrainerCallback):
    """Ends training with a checkpoint after the step in which SIGTERM, SIGUSR1 or Ctrl-C arrived at any rank.

    A second signal ends the process at once. Within two seconds it counts as the same request: a terminal or a
    scheduler sends it to torchrun and its workers, and torchrun forwards it to them again.
    """

    def __init__(self):
        self.received = 0  # the signal that this rank got
        self.stopped_by = 0  # the signal that ended the run before its last step: the same on every rank
        self._since = 0.0

    def handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # os.write: the signal may have interrupted print
                os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint after this step\n".encode())
        elif now - self._since > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        received = self.received
        if args.world_size > 1:  # all ranks must leave after the same step
            of_any = torch.tensor(received, device=args.device)
            torch.distributed.all_reduce(of_any, torch.distributed.ReduceOp.MAX)
            received = int(of_any)
        if received and state.global_step < state.max_steps:
            self.stopped_by = received
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # it would delay the save, or with save_strategy=best prevent it

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped_by:
            control.should_evaluate = False
            # The library would load the best checkpoint and, with a limit of 1, delete the newest.
            args.load_best_model_at_end, args.save_total_limit = False, None


def train_until_stopped(trainer, checkpoint: str | os.PathLike | None) -> None:
    """Train from a checkpoint or from scratch; with save_strategy=no a signal ends the process, as usual.

    Raises:
        Stopped: a signal ended it early, with a checkpoint saved.
    """
    if trainer.args.save_strategy == "no":
        trainer.train(checkpoint)
        return
    stop = StopOnSignal()
    trainer.add_callback(stop)
    before = {number: signal.signal(number, stop.handle) for number in SIGNALS}
    try:
        trainer.train(checkpoint)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.stopped_by:
        raise Stopped(stop.stopped_by, trainer.state)
