"""Many adapters on one base, and one batch in which every row has its own."""

import torch
from tiny import language_model, published, scratch, sentences

import lorahub

with scratch() as folder:
    tenants = [f"tenant{number}" for number in range(6)]
    hub = published(folder, *(f"demo/{tenant}" for tenant in tenants))
    adapters = {tenant: lorahub.load(f"demo/{tenant}@1", hub=hub) for tenant in tenants}

    model, ids = language_model(), sentences()
    with lorahub.attach(model, adapters, active=[]) as live, torch.inference_mode():
        names = [*tenants, None, tenants[0]]
        live.adapter_names = names  # one for each row; None is the base itself
        together = model(ids).logits
        for row, name in enumerate(names):
            with live.using([name] if name else []):
                alone = model(ids[row : row + 1]).logits[0]
            same = torch.allclose(together[row], alone, atol=1e-5)
            print(f"row {row}: {name or 'the base'}, as if it were alone:", same)
