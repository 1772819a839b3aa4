"""Checkpoints of ``Trainer`` while ``lorahub.create`` trains: the adapter alone, and training goes on from it.

Without this a trainer saves the base, as often as it saves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from transformers import TrainerCallback

from lorahub.errors import UsageError
from lorahub.training.rooted import of_child
from lorahub.training.trainee import Trainee

if TYPE_CHECKING:
    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["TraineeCallback"]

_QUANTISED = "_hf_peft_config_loaded"
"""By this a trainer knows that a quantised model has something in it that can be trained."""

_RESUMED = "model.safetensors"
"""From this a trainer takes a model's numbers when it goes on; here those of the adapter alone."""


class TraineeCallback(TrainerCallback):
    """Lets ``Trainer``, or one built on it such as TRL's, save what is trained and go on from there.

        trainee = lorahub.create(model, r=16)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[TraineeCallback(trainee)])
        trainer.train(resume_from_checkpoint=True)  # from the last checkpoint, exactly
        trainer.save_model("ink")

    From the moment that this is made until the adapter is detached, ``model.save_pretrained`` writes the adapter, as
    it does for models of PEFT.  ``RecordCallback(trainee)`` does all of this and records the base as well; of the two
    one is enough, and both do no harm.
    """

    def __init__(self, trainee: Trainee) -> None:
        """Let the model save its adapter.

        Raises:
            UsageError: the model is none of transformers.
        """
        model: Any = trainee.model
        before = vars(model).get("save_pretrained")
        self._trainee = trainee
        if isinstance(before, _Saving):  # it saves so already
            return
        if before is None:
            raise UsageError(
                f"a {type(model).__name__} has no save_pretrained, which a trainer saves by",
                "save the adapter yourself: trainee.save(FOLDER)",
            )
        own = vars(model)
        changed: dict[str, Any] = {
            "save_pretrained": _Saving(trainee),
            "_keys_to_ignore_on_save": {name for name in model.state_dict() if not of_child(name)},
        }
        if getattr(model, "is_quantized", False):
            changed[_QUANTISED] = True
        kept = {name: own[name] for name in changed if name in own}
        own.update(changed)

        def put_back() -> None:
            for name in changed:
                own.pop(name, None)
            own.update(kept)

        trainee.on_detach(put_back)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put beside the adapter what the trainer itself goes on from."""
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or not folder.is_dir():
            return
        every = self._trainee.model.state_dict()
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in every.items() if of_child(name)}
        if not any(hasattr(tensor, "device_mesh") for tensor in own.values()):  # sharded ones are saved as such
            save_file(own, folder / _RESUMED, {"format": "pt"})


@dataclass(slots=True, eq=False)
class _Saving:
    """Stands for the model's ``save_pretrained``."""

    trainee: Trainee

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **_: Any,
    ) -> None:
        if is_main_process:
            self.trainee.save(save_directory, state=state_dict)

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Saving:
        return self
