"""Write down what an adapter was made on, and publish it as a version that never changes."""

from tiny import language_model, scratch

import lorahub

with scratch() as folder:
    model = language_model()
    model.save_pretrained(folder / "base")
    with lorahub.create(model, r=4, target_modules="attention") as trainee:
        trainee.save(folder / "ink")

    names = {"base_repo": "acme/tiny-llama", "base_revision": "1" * 40}
    record = lorahub.record(folder / "ink", folder / "base", name="ink", license="apache-2.0", **names)
    print("recorded:", record.base.repo_id, record.base.weights_digest)
    pushed = lorahub.push(folder / "ink", "demo/ink", version="1.0.0", hub=str(folder / "hub"))
    print("pushed: demo/ink 1.0.0, commit", pushed.pin.commit)
    known = lorahub.versions("demo/ink", hub=str(folder / "hub"))
    print("versions:", ", ".join(str(each.version) for each in known.versions))
