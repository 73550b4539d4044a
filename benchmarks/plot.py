"""The picture of bench.py --plot: output tokens per second against the batch size, under the memory-bandwidth floor."""

from pathlib import Path
from typing import Any


def plot_batch_sizes(path: Path, title: str, results: list[dict[str, Any]]) -> None:
    """Draw results of `measure`, one a batch size, to a picture file; both axes are logarithmic."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit('--plot needs matplotlib: pip install "nano-vllm[plot]"') from None
    matplotlib.use("agg")  # a file is wanted, not a window
    from matplotlib import pyplot

    floors = [result["floor_tok_per_s"] for result in results]
    batch_sizes = [result["num_seqs"] for result in results]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(batch_sizes, floors, "--", color="gray", label="if only memory bandwidth counted")
    axes.plot(batch_sizes, [result["output_tok_per_s"][0] for result in results], "o-", label="measured")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batch_sizes, [str(size) for size in batch_sizes])
    axes.minorticks_off()
    axes.set_xlabel("requests together")
    axes.set_ylabel("output tokens/s")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
