"""Draw the laws of shape against their runs for the documents: `python docs/draw_laws.py`.

Writes `docs/img/laws_morph.svg` and `docs/img/laws_hybrid.svg`, of `docs/scaling_laws.md`, from the files of
`configs/laws`, and prints what the page says of the fits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nemotron_h.core import plot
from nemotron_h.laws.fits import r_squared, relative_errors
from nemotron_h.laws.hybrid import fit_hybrids, hybrid_runs
from nemotron_h.laws.morph import fit_shapes, fitted_runs, published_runs

IMAGES = Path(__file__).resolve().parent / "img"
#: mixes of our own runs, told by their patterns
MIXES = {
    "one Mamba-2 layer per two FFNs": lambda m, a, f: m < f and 5 * a < m + a + f,
    "one per FFN": lambda m, a, f: m == f and 5 * a < m + a + f,
    "two per FFN": lambda m, a, f: m > f and 5 * a < m + a + f,
    "a third attention": lambda m, a, f: 5 * a >= m + a + f,
}


@plot.styled
def draw_morph() -> None:
    """Plot predicted loss over measured loss, fitted runs and others, with the shape and without."""
    rows = published_runs()
    fitted = fitted_runs(rows)
    others = [row for row in rows if row not in fitted]
    figure, panels = plot.canvas(760, 330, columns=2, sharey=True)
    for axes, with_shape in zip(panels, (False, True), strict=True):
        fit = fit_shapes(fitted, with_shape)
        for some, words, colour in ((others, "not fitted to", plot.SERIES[1]), (fitted, "fitted to", plot.SERIES[0])):
            measured = [row["loss"] for row in some]
            errors = [100 * (fit.predict(row) / row["loss"] - 1) for row in some]
            axes.plot(measured, errors, "o", color=colour, markersize=4, label=f"{len(some)} runs {words}")
        axes.axhline(0, color=plot.INK, linewidth=1)
        r2 = r_squared([fit.predict(row) for row in rows], [row["loss"] for row in rows])
        axes.set(title=f"{'with' if with_shape else 'without'} the shape: R² {r2:.4f}", xlabel="measured loss")
        values = ", ".join(f"{name} {value:.5g}" for name, value in fit.coefficients.items())
        error = 100 * np.mean(relative_errors(fit, others))
        print(f"Morph, {'with' if with_shape else 'without'} shape: {values}; R2 {r2:.4f}; others {error:.2f} %")
    panels[0].set_ylabel("predicted over measured loss, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    words = "Errors of Morph's law on its published runs, without and with the shape"
    plot.save(figure, IMAGES / "laws_morph.svg", words)


@plot.styled
def draw_hybrid() -> None:
    """Plot the loss of our own runs over hidden size per layer, and the law at each run."""
    rows = hybrid_runs()
    fit = fit_hybrids(rows)
    figure, axes = plot.canvas(640, 360)
    for (words, belongs), colour in zip(MIXES.items(), plot.SERIES, strict=False):
        some = sorted(
            (row for row in rows if belongs(*map(row["pattern"].count, "M*-"))),
            key=lambda row: row["hidden_size"] / row["layers"],
        )
        aspects = [row["hidden_size"] / row["layers"] for row in some]
        axes.plot(aspects, [row["loss"] for row in some], "o", color=colour, markersize=6, label=words)
        axes.plot(aspects, [fit.predict(row) for row in some], "_", color=colour, markersize=16)
    axes.set_xscale("log")
    ticks = (2, 5, 10, 20, 50, 100)
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set(xlabel="hidden size / layers", ylabel="validation loss (bars: the law)")
    axes.legend(loc="upper right")
    plot.save(
        figure, IMAGES / "laws_hybrid.svg", "Loss of small hybrids over hidden size per layer, and the fitted law"
    )
    print(fit)
    for hidden in sorted({row["hidden_size"] for row in rows}):
        some, others = ([row for row in rows if (row["hidden_size"] == hidden) is here] for here in (True, False))
        errors = [f"{100 * error:.1f}" for error in relative_errors(fit_hybrids(others), some)]
        losses = [f"{row['pattern']} {row['loss']:.3f}" for row in some]
        print(f"hidden size {hidden}: {', '.join(losses)}; error in % of a fit without: {', '.join(errors)}")


if __name__ == "__main__":
    draw_morph()
    draw_hybrid()
