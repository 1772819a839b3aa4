"""Fetch a version from a hub, look before leaping, merge it into the base, and take it out again bit for bit."""

import torch
from tiny import language_model, published, scratch, sentences

import lorahub

with scratch() as folder:
    hub = published(folder, "demo/ink")
    pulled = lorahub.pull("demo/ink@1", hub=hub)
    print("pulled:", ", ".join(sorted(path.name for path in pulled.folder.iterdir())))

    model, ids = language_model(), sentences()
    with torch.inference_mode():
        before = model(ids).logits
    ink = lorahub.load(pulled.folder)
    print("does it fit?", lorahub.check(ink, folder / "base").verdict)
    merged = lorahub.merge(model, {"ink": ink}, weights=[0.8])
    with torch.inference_mode():
        print(f"merged: scores moved by {(model(ids).logits - before).norm() / before.norm():.0%}")
        merged.undo()
        print("undone, bit for bit:", torch.equal(model(ids).logits, before))
