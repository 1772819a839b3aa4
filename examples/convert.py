"""One adapter in the layouts of several programs, and back: the same bits under other names."""

import torch
from safetensors.torch import load_file
from tiny import language_model, published, scratch

import lorahub

with scratch() as folder:
    hub = published(folder, "demo/ink")
    for layout in ("mlx", "torchtune", "peft"):
        try:
            done = lorahub.convert("demo/ink@1", layout, folder / layout, hub=hub, base=language_model())
        except lorahub.LorahubError as refused:
            print(f"{layout}: {refused}")
            continue
        print(f"{layout}:", ", ".join(sorted(path.name for path in (folder / layout).iterdir())))
    old = load_file(lorahub.pull("demo/ink@1", hub=hub).folder / "adapter_model.safetensors")
    new = load_file(folder / "peft" / "adapter_model.safetensors")
    print("to peft, the same bits:", all(torch.equal(new[name], old[name]) for name in old.keys() | new.keys()))
