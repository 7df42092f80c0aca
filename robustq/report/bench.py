"""Output of bench, also with --all."""

from __future__ import annotations

from robustq.report.text import Result, percent, size

COLUMNS = ("file", "size", "median", "p99", "images/s", "load", "memory", "against float")


def bench_lines(result: Result) -> list[str]:
    """The machine, and one line a file."""
    rows = result["rows"]
    table = [
        COLUMNS,
        *(
            (
                row["file"],
                size(row["size_bytes"]),
                f"{row['median_ms']:.3g} ms",
                f"{row['p99_ms']:.3g} ms",
                f"{row['images_per_second']:,.0f}" + (" (single)" if row["batch"] == 1 else ""),
                f"{row['load_ms']:.3g} ms",
                size(row["memory_bytes"]),
                "-" if row["latency_ratio"] is None else f"{row['latency_ratio']:.2f}",
            )
            for row in rows
        ),
    ]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    batch = max(row["batch"] for row in rows)
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    lines = [
        f"machine {result['cpu']} · {result['runtime']} · {threads} · latency of one image, images/s in batches of "
        f"{batch}"
    ]
    for line in table:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        lines.append("  ".join([line[0].ljust(widths[0]), *cells]))
    if result["float_file"] is None:
        lines.append("note    no float file to compare with; give one: --float FILE.onnx")
    return lines


ALL_COLUMNS = ("format", "runtime", "clean", "under attack", "size", "median", "p99", "images/s")


def all_lines(result: Result) -> list[str]:
    """Bench --all: the machine, a table for each folder, and what was left out."""
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    lines = [f"machine {result['cpu']} · {threads} · latency of one image"]
    for folder in dict.fromkeys(row["folder"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["folder"] == folder]
        lines.append(f"folder  {folder}: {rows[0]['images']:,} images of its kit, found for its own file")
        table = [ALL_COLUMNS, *map(_all_cells, rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(ALL_COLUMNS))]
        for line in table:
            names = (cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True))
            cells = (cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True))
            lines.append("  ".join([*names, *cells]).rstrip())
        lines += [f"refused {row['format']} in {row['runtime']}: {row['refused']}" for row in rows if row["refused"]]
    return [*lines, *(f"note    {reason}" for reason in result["left_out"])]


def _all_cells(row: Result) -> tuple[str, ...]:
    timing = row["timing"]
    times = ("-", "-", "-")
    if timing is not None:
        times = (f"{timing['median_ms']:.3g} ms", f"{timing['p99_ms']:.3g} ms", f"{timing['images_per_second']:,.0f}")
    accuracies = (percent(row["clean_accuracy"]), percent(row["robust_accuracy"]))
    return (row["format"], f"{row['runtime']} {row['version']}", *accuracies, size(row["size_bytes"]), *times)
