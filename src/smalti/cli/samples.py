"""``smalti samples``: the embedded scenes as ordinary folders."""

from smalti.cli.options import Debug, Out, Quiet, Settings, needed, take

NAME = "samples"


def command(words: Settings = None, out: Out = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write scenes on real photographs with exact masks, instances, boxes and classes.

    Settings: num_train, num_val, size (pixels), seed.
    """
    out = needed(out, "--out", "samples")
    given = take(words, {"num_train": 2000, "num_val": 400, "size": 96, "seed": 0})

    from smalti.data.samples import write_samples

    print(f"written: {write_samples(out, **given)}")
