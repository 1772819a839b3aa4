"""From one task to the next on a model in memory: choose, mix, exchange, take off."""

import torch
from tiny import language_model, published, scratch, sentences

import lorahub

with scratch() as folder:
    hub = published(folder, "demo/ink", "demo/wash", "demo/chalk")
    model, ids = language_model(), sentences()
    with torch.inference_mode():
        base = model(ids).logits

        def moved() -> str:
            return f"scores {(model(ids).logits - base).norm() / base.norm():.0%} away from the base's"

        live = lorahub.attach(model, {name: lorahub.load(f"demo/{name}", hub=hub) for name in ("ink", "wash")})
        live.set_adapters(["ink"])
        print("ink:", moved())
        live.set_adapters(["ink", "wash"], weights=[0.5, 0.5])
        print("half ink, half wash:", moved())
        live.swap("wash", lorahub.load("demo/chalk", hub=hub))
        print("half ink, half chalk in the place of wash:", moved())
        live.detach()
        print("taken off, bit for bit the base:", torch.equal(model(ids).logits, base))
