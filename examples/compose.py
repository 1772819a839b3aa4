"""Two adapters made into one: an exact sum, and TIES cut back to the rank of one of them."""

from tiny import published, scratch

import lorahub

with scratch() as folder:
    hub = published(folder, "demo/ink", "demo/wash")
    ink, wash = (lorahub.load(f"demo/{name}@1.0", hub=hub) for name in ("ink", "wash"))
    print(f"likeness of their changes: {lorahub.similarity([ink, wash]).cosine(0, 1):.2f}")

    both = lorahub.compose(0.7 * ink + 0.3 * wash, out=folder / "both")
    print("the sum:", {row.rank for row in lorahub.inspect(folder / "both").rows}, "is its rank, and nothing is lost")
    ties = lorahub.compose({"ink": ink, "wash": wash}, weights=[1, 1], method="ties", density=0.5, rank=4)
    print(f"ties, cut to rank 4: {ties.report.energy:.0%} of its squared norm is kept")
