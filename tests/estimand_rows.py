"""Rows and replicates with chosen numbers, as estimands read them."""

from bnbench.study import Entry, Replicate, Result, Trial


def entry(arm="batch", role="own", curve=(), status="done", steps=100, batch_size=64, lr=0.1, **metrics):
    metrics = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    series = {"step": tuple(s for s, _ in curve), "val/acc": tuple(a for _, a in curve)}
    trial = Trial(steps=steps, batch_size=batch_size, lr=lr)
    return Entry("cell", arm, 0, role, trial, Result(status, {"chance": 0.1, **metrics}, series))


def replicate(*entries, target=0.9):
    return Replicate("cell", 0, {"target": target}, entries)


def reaching(steps):
    """A curve whose crossing of .9 lies at exactly this step."""
    return ((steps / 2, 0.5), (steps, 0.9), (100, 0.95))


FLAT = ((1, 0.2), (100, 0.5))


def sweep(arm, points, role="sweep", chance=0.1):
    rows = [entry(arm, role, lr=lr, val_acc=accuracy) for lr, accuracy in points]
    for row in rows:
        row.result.metrics["chance"] = chance
    return rows
