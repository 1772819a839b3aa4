"""Every code that a finding of lorahub's own has: what ``--allow`` may name.

A plugin whose findings have codes of its own lists them as ``LORAHUB_FINDINGS = ("some-code",)`` in its module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from lorahub.errors import UsageError
from lorahub.names import did_you_mean, printable

__all__ = ["CODES", "demand_known"]

CODES: Final = frozenset(
    """
    access-denied adapter-name-in-key alpha-conflict alpha-unknown alpha-unused alpha-void bad-name base-architecture
    base-commit-chosen base-commit-differs-weights-equal base-commit-equal base-declared-compatible
    base-declared-relative base-is-a-local-path base-is-quantised base-left-out base-needed base-parameter-missing
    base-quantised base-repo-differs-weights-equal base-repo-id-missing base-undeclared base-unknown base-unnamed
    base-unrecorded base-untouched-weights-differ base-weight base-weights base-weights-differ base-weights-equal
    base-weights-unknown base-weights-unrecorded bases-differ budget-unmet cannot-carry card-base-differs
    card-base-replaced card-dataset-removed card-differs card-license-differs card-path-in-text card-replaces-hub-text
    card-unclear case-collision change-cut changes-nothing comfyui-alpha-unread comfyui-dora comfyui-format
    comfyui-oft comfyui-peft comfyui-unknown commit-gone compat-choice compat-chosen compat-refused
    component-elsewhere components config-conflict controlnet-apart controlnet-needed
    config-contradicts-tensors config-missing config-refused config-unknown
    config-unreadable delta-lost diffusers-alpha-lost diffusers-alpha-twice diffusers-alpha-unread
    diffusers-blocks diffusers-difference diffusers-dora-scale diffusers-flux diffusers-format
    diffusers-kind diffusers-left-out diffusers-lokr diffusers-module-dropped diffusers-names diffusers-tucker
    disabled drawn-again embedding-included files-missing folder-left folder-not-updated head-incomplete
    head-without-bias kernel-plain key-twice key-unknown kind-unsupported
    layers-contradict layers-differ layers-out-of-range layers-repeated layers-tied layers-undeclared
    layout-undeclared layout-unsupported library-out-of-range license-missing link lock-adapter-moved
    lock-adapters-differ lock-base-moved lock-file-differs lock-outdated lock-output-differs lock-recipe-changed
    lock-versions-differ lock-weights-differ merged-already mode-unfit module-ambiguous modules-to-save-in-key
    modules-to-save-twice name-missing names-of-diffusers names-of-llama-cpp names-of-torchtune names-translated
    names-unknown no-adapter no-weights norm-left-out not-a-file not-finite not-resized nothing-lands nothing-shared
    oft-scale-assumed original-module parameter-ambiguous parameter-missing parameter-new parameter-twice
    part-left-out parts-left-out payment-required peft-files peft-format peft-grouped peft-layer peft-mamba
    peft-module peft-oblong-kernel peft-oft-unmerged peft-product pickle-weights policy-license policy-owner
    quantised-merge rank-above-side rate-limited readme-unreadable record-invalid
    record-stale repo-missing repo-renamed result-of-this-machine
    row-order-unknown runtime-accepts saved-infix saved-twice scale-assumed secret-file secret-text several-adapters
    shape-differs shape-mismatch slot-dtype slot-misfit slot-missing storage-full storage-unsupported
    structure-differs superseded tag-moved taken-whole target-missing target-removed target-unfilled target-unlisted
    targets-differ tensor-empty tensor-quantised tie-undeclared tied-differently tied-parameter token-refused
    too-large too-many-files trained-quantised two-replacements two-shapes unknown-file unreadable version-missing
    versions-from-cache vllm-activated vllm-bias vllm-block-diagonal vllm-changed-base vllm-convolution vllm-dora
    vllm-format vllm-kind vllm-layer-replication vllm-lora-bias vllm-modules-to-save vllm-prefix vllm-qalora vllm-rank
    vllm-rank-limit vllm-suffix weight-is-linear weight-zero
    """.split()  # noqa: SIM905 - to be read as words
)
"""Kept equal to the source by ``tests/unit/test_codes.py``."""


def demand_known(codes: Iterable[str], more: Collection[str] = ()) -> None:
    """See that findings have these codes, so that a misspelt one is not taken for an answer.

    Args:
        codes: as they were given.
        more: the codes of plugins.

    Raises:
        UsageError: no finding ever has one of them.
    """
    for code in codes:
        if code not in CODES and code not in more:
            raise UsageError(
                f"no finding has the code '{printable(code)}'.{did_you_mean(code, sorted({*CODES, *more}))}",
                "A finding's code is shown with it, and stands under 'code' in --json.",
            )
