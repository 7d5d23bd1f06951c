"""The keys of a file of measured layers: of `nemotron-h layer-costs` for shapes, or of Puzzle's table of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemotron_h.core.strict import number

#: name of the row of final norm and output matrix, beside the kinds of layers
ENDS = "ends"


@dataclass
class Scenario:
    """Sequences and tokens of a generation.

    Attributes:
        batch: sequences at once.
        context: tokens of each prompt.
        output: tokens of each answer.
    """

    batch: int = number(1, least=1)
    context: int = number(2048, least=1)
    output: int = number(0, least=0)

    @property
    def decoded_at(self) -> int:
        """Return the tokens that a sequence has at the middle of its answer, where a step takes the mean time."""
        return self.context + self.output // 2

    def __str__(self) -> str:
        answer = f" and {self.output:,} of answer" if self.output else ""
        return f"batch {self.batch}, {self.context:,} tokens of prompt{answer}"


@dataclass
class Machine:
    """Machine and settings of a measurement.

    Attributes:
        name: as `--on` takes it.
        processor: its model.
        threads: of PyTorch; 0 on a GPU.
        dtype: of weights and activations.
        torch: version.
        engine: that generates.
        command: that measured.
        note: other circumstances, such as the load of the machine.
    """

    name: str = MISSING
    processor: str = MISSING
    threads: int = number(least=0)
    dtype: str = MISSING
    torch: str = MISSING
    engine: str = "nemotron_h"
    command: str = ""
    note: str = ""


@dataclass
class Cost:
    """Measured layer.

    Attributes:
        hidden_size: of its model.
        parameters: of the layer; of `ends`, those of the output matrix and the final norm.
        prefill, decode: seconds, as of `Latency`.
        widths: all of the layer, in a table of blocks; of `ends`, hidden size and vocabulary. Empty where the layer is
            one of a model at this hidden size, between which others are read off.
    """

    hidden_size: int = number(least=1)
    parameters: int = number(least=1)
    prefill: float = number(above=0)
    decode: float = number(above=0)
    widths: dict[str, int] = field(default_factory=dict)


@dataclass
class LayerCosts:
    """Latency of one layer of each kind at several sizes, in one scenario on one machine.

    Attributes:
        machine, scenario: of the measurement.
        widths: keys of the model that all measured layers share, such as `mamba_head_dim`.
        layers: kind, or `ends` -> costs.
    """

    machine: Machine = field(default_factory=Machine)
    scenario: Scenario = field(default_factory=Scenario)
    widths: dict[str, int] = field(default_factory=dict)
    layers: dict[str, list[Cost]] = field(default_factory=dict)
