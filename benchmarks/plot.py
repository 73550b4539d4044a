"""Pictures of what bench.py measures: by batch size (bench.py --plot), and by ranks (benchmarks.scaling --plot)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def axes_in(path: Path, title: str, x_label: str, x_ticks: list[int], y_label: str) -> Iterator[Any]:
    """Axes to draw on, x by powers of two; at the end they are saved to a picture file."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit('--plot needs matplotlib: pip install "nano-vllm[plot]"') from None
    matplotlib.use("agg")  # a file is wanted, not a window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set_xscale("log", base=2)
    yield axes
    axes.set_xticks(x_ticks, [str(tick) for tick in x_ticks])
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_batch_sizes(path: Path, title: str, results: list[dict[str, Any]]) -> None:
    """Draw results of `measure`, one a batch size, under the memory-bandwidth floor."""
    batch_sizes = [result["num_seqs"] for result in results]
    with axes_in(path, title, "requests together", batch_sizes, "output tokens/s") as axes:
        from matplotlib import ticker

        floors = [result["floor_tok_per_s"] for result in results]
        axes.plot(batch_sizes, floors, "--", color="gray", label="if only memory bandwidth counted")
        axes.plot(batch_sizes, [result["output_tok_per_s"][0] for result in results], "o-", label="measured")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))


def plot_scaling(path: Path, reports: list[dict[str, Any]]) -> None:
    """Draw reports of bench.py, one a model and number of ranks: a line for each workload of a model."""
    lines: dict[str, dict[int, float]] = {}  # tokens/s by ranks
    for report in reports:
        for result in report["results"]:
            line = lines.setdefault(f"{report['model']}, {result['case']}", {})
            line[report["num_devices"]] = result["output_tok_per_s"][0]
    ranks = sorted({size for line in lines.values() for size in line})
    title = f"tensor parallelism, {reports[0]['dtype']}, {reports[0]['device']}"
    with axes_in(path, title, "ranks", ranks, "speed-up, in output tokens/s") as axes:
        axes.plot(ranks, [size / ranks[0] for size in ranks], "--", color="gray", label="in proportion to the ranks")
        for name, line in lines.items():
            base = line[ranks[0]]
            axes.plot(list(line), [rate / base for rate in line.values()], "o-", label=f"{name} (from {base:,.0f})")
        axes.set_ylim(bottom=0)
