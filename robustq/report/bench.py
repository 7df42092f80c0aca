"""Output of bench."""

from __future__ import annotations

from robustq.report.text import Result, size

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
