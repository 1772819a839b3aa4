"""Recording while training: the base, its commit and the run, written beside every adapter that a trainer saves.

After training, these are what nobody knows any more: a saved adapter names its base by whatever it was loaded by, at no
commit.  Nothing that goes wrong here stops a training; it is said when it happens, and once more at the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lorahub.errors import LorahubError, UsageError
from lorahub.files.atomic import atomic_write
from lorahub.findings import Finding, Verdict
from lorahub.records import FILENAME, AdapterRecord
from lorahub_transformers.checkpoints import TraineeCallback
from lorahub_transformers.origin import base_of
from lorahub_transformers.trained_base import TrainedBase
from lorahub_transformers.training_facts import datasets_in, training_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from lorahub.fetching import Source
    from lorahub.record_fields import Dataset, Training
    from lorahub.training.trainee import Trainee

__all__ = ["RecordCallback"]

_log = logging.getLogger("lorahub_transformers")

_CONFIG = "adapter_config.json"


class RecordCallback(TrainerCallback):
    """Writes ``lorahub.json`` beside every adapter that ``Trainer``, or one built on it such as TRL's, saves.

        recorder = RecordCallback(license="apache-2.0")
        trainer = Trainer(model, args, train_dataset=data, callbacks=[recorder])
        trainer.train()  # every checkpoint is recorded
        trainer.save_model("ink")
        recorder.record("ink")

    The base is found by itself: the repository and commit whose files in the Hub's cache hold the model's numbers, or
    the folder that it was loaded from.  Its weights are hashed in the background, while training begins.

    Attributes:
        records: folder -> its record, of every folder that was written to.
        said: what could not be written down, and why.
    """

    def __init__(
        self,
        trainee: Trainee | None = None,
        *,
        base: Source | None = None,
        datasets: Sequence[str] = (),
        compat: str | None = None,
        **fields: Any,
    ) -> None:
        """Write nothing yet.

        Args:
            trainee: what ``lorahub.create`` made.  Checkpoints hold it then in place of the base, and a training goes
                on from them, as with ``TraineeCallback``.
            base: what the adapter is trained on, as a folder or ``ns/name@COMMIT``; None finds out.
            datasets: what it is trained on, as ``ns/name`` or ``ns/name@COMMIT``; by default those on the Hub that the
                training data says it came from.
            compat: "peft" or "strict": whose result counts where PEFT's is not the declared one; None takes "peft" for
                what PEFT trains.
            fields: further fields of the record, as ``license="mit"``.
        """
        self._given, self._named, self._compat, self._fields = base, tuple(datasets), compat, fields
        self._trainee = trainee
        # a module that is none of transformers is saved whole by the trainer, with what is trained in it
        saved = trainee is not None and "save_pretrained" in vars(trainee.model)
        self._goes_on = TraineeCallback(trainee) if trainee is not None and saved else None
        self._base: TrainedBase | None = None
        self._datasets: tuple[Dataset, ...] = ()
        self._training: Training | None = None
        self._main = True
        self.records: dict[Path, AdapterRecord] = {}
        self.said: list[Finding] = []

    # ---- what the trainer calls

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look where the model came from, while that can be seen."""
        self._main = state.is_world_process_zero
        if self._main and model is not None:
            inner = model
            self._guarded("the base", lambda: self._begin(inner))
            self._guarded("the dataset", lambda: self._see(train_dataloader))
            self._guarded("the run", lambda: self._look(args, state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the adapters in the checkpoint that was saved."""
        checkpoint = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if self._goes_on is not None:  # unguarded: without this a training that goes on would begin anew
            self._goes_on.on_save(args, state, control)
        if self._trainee is not None and (self._main or _sharded(self._trainee)):
            trainee = self._trainee
            self._guarded(f"the adapter in {checkpoint}", lambda: trainee.save(checkpoint))
        if not self._main or self._base is None:
            return
        self._guarded("the run", lambda: self._look(args, state))
        if not checkpoint.is_dir():  # a trial of a search saves elsewhere, and an old checkpoint may be gone again
            return
        folders = list(_adapters_in(checkpoint))
        if not folders:
            self._say(
                Finding(
                    code="adapter-missing",
                    axis="format",
                    level=Verdict.UNVERIFIED,
                    message=f"{checkpoint} holds no adapter, so there is nothing to record in it",
                    remedy="of an adapter from lorahub.create: RecordCallback(trainee)",
                )
            )
        for folder in folders:
            self._guarded(str(folder), lambda folder=folder: self._write(folder))  # type: ignore[misc]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what is known of the whole run, and say what is recorded and what is not."""
        if not self._main or self._base is None:
            return
        self._guarded("the run", lambda: self._look(args, state))
        written = [folder for folder in self.records if folder.is_dir()]
        _log.info("%d folders of adapters are recorded", len(written))
        for finding in dict.fromkeys(self.said):
            _log.warning("%s%s", finding.show(), f"; {finding.remedy}" if finding.remedy else "")

    # ---- what people call

    def record(self, folder: str | os.PathLike[str]) -> AdapterRecord | None:
        """Record an adapter that was saved otherwise, as by ``trainer.save_model(folder)`` after the training.

        Returns:
            The record; None on processes other than the main one, which write nothing.

        Raises:
            UsageError: no training has begun, or the folder holds no adapter.
            BaseMismatch, IntegrityError, RecordError: as ``lorahub.record``.
        """
        if not self._main:
            return None
        if self._base is None:
            raise UsageError(
                "no training has begun, so nothing is known to record",
                "give the callback to a trainer and train; or: lorahub record FOLDER --base BASE",
            )
        folders = list(_adapters_in(Path(folder)))
        if not folders:
            raise UsageError(f"{folder} holds no adapter", "save one there first: trainer.save_model(FOLDER)")
        records = [self._write(each) for each in folders]
        return records[0]

    # ---- how

    def _begin(self, model: nn.Module) -> None:
        peft = hasattr(model, "peft_config")
        self._base = TrainedBase(base_of(model), self._given, compat=self._compat or ("peft" if peft else None))
        for finding in self._base.said:
            self._say(finding)

    def _see(self, loader: Any) -> None:
        self._datasets = datasets_in(self._named, loader)

    def _look(self, args: TrainingArguments, state: TrainerState) -> None:
        self._training = training_of(args, state, self._datasets)

    def _write(self, folder: Path) -> AdapterRecord:
        base = self._base
        assert base is not None  # whoever calls has looked
        record = base.drafted(folder, {**({"training": self._training} if self._training else {}), **self._fields})
        atomic_write(folder / FILENAME, record.to_json().encode())
        for finding in base.said:
            self._say(finding)
        self.records[folder] = record
        return record

    def _guarded(self, what: str, do: Callable[[], object]) -> None:
        """Do it; whatever goes wrong is said, for a training must not end by what is merely written down."""
        try:
            do()
        except Exception as error:  # noqa: BLE001 - see above: no fault here is worth a training
            why = error.message if isinstance(error, LorahubError) else f"{type(error).__name__}: {error}"
            self._say(
                Finding(
                    code="not-recorded",
                    axis="base",
                    level=Verdict.DEGRADED,
                    message=f"{what} was not recorded: {why}",
                    remedy=getattr(error, "hint", "") or "lorahub record FOLDER --base BASE",
                )
            )

    def _say(self, finding: Finding) -> None:
        if finding not in self.said:
            self.said.append(finding)
            _log.warning("%s", finding.show())


def _sharded(trainee: Trainee) -> bool:
    """Whether all processes have to save together, each its own part."""
    return any(hasattr(own, "device_mesh") for own in trainee.parameters())


def _adapters_in(folder: Path) -> Iterator[Path]:
    """Where adapters lie: in the folder, and where there are several, in folders of their names."""
    inner = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    yield from (each for each in (folder, *inner) if (each / _CONFIG).is_file())
