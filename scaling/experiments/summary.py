"""Rows for reading: means beside their goals, as a Markdown table."""

from collections.abc import Mapping
from statistics import geometric_mean

from scaling.runs.rows import Row


def summarise(rows: list[Row], goals: Mapping[str, tuple[str, float]]) -> list[Row]:
    """One row a case and number of ranks: geometric mean of the ratios over N, or the largest
    value, beside its goal."""
    found = []
    for case, sp in dict.fromkeys((row["case"], row["sp"]) for row in rows):
        some = [row for row in rows if (row["case"], row["sp"]) == (case, sp)]
        ratios = [row["ratio"] for row in some if row["ratio"] is not None]
        value = geometric_mean(ratios) if ratios else max(row["value"] for row in some)
        row = {"case": case, "sp": sp, "value": value, "goal": "", "met": ""}
        row["unit"] = "" if ratios else some[0]["unit"]
        if case in goals:
            sign, goal = goals[case]
            met = value >= goal if sign == ">=" else value <= goal
            row |= {"goal": f"{sign} {goal:g}", "met": "yes" if met else "no"}
        row["by_length"] = {
            r["length"]: r["value"] if r["ratio"] is None else r["ratio"] for r in some
        }
        found.append(row)
    return found


def table(summary: list[Row]) -> str:
    """The summary as a Markdown table; ratios, or values and their unit where nothing is
    compared."""
    lengths = sorted({n for row in summary for n in row["by_length"] if n})
    heads = ["case", "sp", *map(_power_of_two, lengths), "mean or worst", "goal", "met"]
    lines = [heads, ["---"] * len(heads)]
    for row in summary:
        case = f"{row['case']}, {row['unit']}" if row["unit"] else row["case"]
        by = row["by_length"]
        numbers = [_number(by[n]) if n in by else "" for n in lengths]
        lines.append([case, str(row["sp"]), *numbers, _number(row["value"]), row["goal"],
                      row["met"]])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(x: int | float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _power_of_two(n: int) -> str:
    return f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)
