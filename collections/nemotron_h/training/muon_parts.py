"""Parts of matrices that Muon orthogonalizes, and the ranks that hold them and that iterate on them.

A distributed optimizer's rank holds flat ranges of its tensor-parallel share of each matrix. A part is iterated on
whole: its pieces go to one rank, which orthogonalizes it, and come back. In a round every rank of the group gets one
part, the largest first, so that the work is spread and a rank holds one whole part at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemotron_h.architecture.blocks.block import Matrix


@dataclass(frozen=True)
class Role:
    """Role of a parameter: the matrix that it is, or a share of.

    Attributes:
        kind: name of the block and of the matrix, such as `mamba.in_proj`.
        matrix: as its block declares it.
        tensor: ranks that its tensor-parallel shares lie on.
    """

    kind: str
    matrix: Matrix
    tensor: int


def roles(model: nn.Module) -> dict[nn.Parameter, Role]:
    """Return the parameters of this rank's layers that Muon orthogonalizes, in the model's order."""
    roles: dict[nn.Parameter, Role] = {}
    blocks, tensor = model.config.definition().blocks, model.config.tensor_model_parallel_size
    for layer in model.decoder.layers:
        block = blocks[layer.layer_number - 1]
        for matrix in block.matrices():
            if matrix.parts is None:
                continue
            room, _, name = matrix.name.rpartition(".")
            # Transformer Engine numbers the weights of grouped experts, Megatron the experts
            path = re.compile(rf"(^|\.){re.escape(room)}(\.local_experts\.\d+)?\.?{name}\.weight\d*$")
            role = Role(f"{block.name}.{matrix.name}", matrix, tensor if matrix.split else 1)
            roles |= {weight: role for key, weight in layer.named_parameters() if path.search(key)}
    return {weight: role for weight, role in roles.items() if weight.requires_grad}


def kinds(model: nn.Module) -> list[str]:
    """Return the kinds of all layers of the model, on other pipeline stages too."""
    blocks = model.config.definition().blocks
    names = (f"{block.name}.{m.name}" for block in blocks for m in block.matrices() if m.parts is not None)
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Holding:
    """Ranges that one rank of the group holds.

    Attributes:
        tensor: its tensor-parallel rank.
        ranges: number of the matrix -> first and last + 1 of the flat elements of its share.
    """

    tensor: int
    ranges: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Part:
    """Part of a matrix that is orthogonalized by itself.

    Attributes:
        number: of the matrix.
        rows: of a rank's share.
        columns: of a rank's share.
        shares: tensor-parallel ranks whose shares make the part, in order.
        axis: that they are concatenated along.
        copies: the other tensor-parallel ranks hold the same part, and get the result too.
    """

    number: int
    rows: range
    columns: int
    shares: tuple[int, ...] = (0,)
    axis: int = 0
    copies: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Return rows and columns of the whole part."""
        count = len(self.shares)
        return (len(self.rows) * count, self.columns) if self.axis == 0 else (len(self.rows), self.columns * count)

    @property
    def size(self) -> int:
        """Return the elements of one share."""
        return len(self.rows) * self.columns

    def piece(self, holding: Holding) -> tuple[int, int]:
        """Return the elements of a share that a rank holds: first and last + 1, of the flat part; (0, 0) is none."""
        if not (self.copies or holding.tensor in self.shares) or self.number not in holding.ranges:
            return 0, 0
        first = self.rows.start * self.columns
        start, stop = (min(max(end - first, 0), self.size) for end in holding.ranges[self.number])
        return (start, stop) if stop > start else (0, 0)

    def source(self, holding: Holding) -> tuple[int, int]:
        """Return the elements that a rank sends to be iterated on; of copies the first tensor-parallel rank's."""
        return self.piece(holding) if holding.tensor in self.shares else (0, 0)

    def join(self, shares: dict[int, Tensor]) -> Tensor:
        """Return the whole part of flat shares, by tensor-parallel rank."""
        return torch.cat([shares[share].view(len(self.rows), self.columns) for share in self.shares], dim=self.axis)

    def split(self, whole: Tensor, tensor: int) -> Tensor:
        """Return the flat share of a tensor-parallel rank."""
        at = 0 if self.copies else self.shares.index(tensor)
        return whole.chunk(len(self.shares), dim=self.axis)[at].reshape(-1)


def parts_of(number: int, role: Role, columns: int, tensor: int) -> Iterator[Part]:
    """Yield the parts of a matrix over the tensor-parallel ranks of a group.

    Args:
        columns: of one rank's share.
        tensor: ranks of the group that have a tensor-parallel rank of their own.
    """
    matrix, axis = role.matrix, 1 if role.matrix.split == "inputs" else 0
    for rows in matrix.part_rows(role.tensor):
        if matrix.groups > 1:  # every rank has other groups, each whole
            yield from (Part(number, rows, columns, (rank,)) for rank in range(role.tensor))
        else:
            yield Part(number, rows, columns, tuple(range(role.tensor)), axis, copies=tensor > role.tensor)


class Exchange:
    """Moves of the parts to the ranks that iterate on them, and back.

    Args:
        roles: of this rank's matrices, in an order that is the same on all ranks of the group.
        columns: of this rank's shares.
        holding: of this rank.
        group: over data-parallel and tensor-parallel ranks.
        device: of the weights.
    """

    def __init__(
        self, roles: list[Role], columns: list[int], holding: Holding, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self.group, self.device, self.size = group, device, dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.holdings: list[Holding] = [holding] * self.size
        if self.size > 1:
            dist.all_gather_object(self.holdings, holding, group=group)
        tensor = len({each.tensor for each in self.holdings})
        matrices = enumerate(zip(roles, columns, strict=True))
        parts = [part for number, (role, width) in matrices for part in parts_of(number, role, width, tensor)]
        parts.sort(key=lambda part: -part.shape[0] * part.shape[1] * min(part.shape))
        self.rounds = [parts[at : at + self.size] for at in range(0, len(parts), self.size)]
        for part in parts:
            pieces = sum(stop - start for start, stop in map(part.source, self.holdings))
            if pieces != part.size * len(part.shares):
                raise RuntimeError(f"ranks hold {pieces} elements of a part of {part.shape}: {part}")

    def to_owner(self, parts: list[Part], pieces: list[Tensor]) -> Tensor | None:
        """Return the whole part that this rank iterates on in a round, None where there is none.

        Args:
            parts: of the round; the first is the first rank's.
            pieces: what this rank sends of each, bfloat16.
        """
        mine = parts[self.rank] if self.rank < len(parts) else None
        spans = [mine.source(holding) if mine else (0, 0) for holding in self.holdings]
        received = self._swap(pieces, [stop - start for start, stop in spans])
        if mine is None:
            return None
        shares = {share: torch.empty(mine.size, dtype=torch.bfloat16, device=self.device) for share in mine.shares}
        for holding, (start, stop), piece in zip(self.holdings, spans, received, strict=True):
            if stop > start:
                shares[holding.tensor][start:stop] = piece
        return mine.join(shares)

    def from_owner(self, parts: list[Part], whole: Tensor | None) -> list[Tensor]:
        """Return this rank's pieces of the round's results, a flat bfloat16 tensor for each part.

        Args:
            whole: the result of this rank's part.
        """
        sent: list[Tensor] = []
        for holding in self.holdings if whole is not None else ():
            start, stop = parts[self.rank].piece(holding)
            share = parts[self.rank].split(whole, holding.tensor) if stop else whole.new_empty(0)
            sent.append(share[start:stop])
        spans = [part.piece(self.holdings[self.rank]) for part in parts]
        return self._swap(sent, [stop - start for start, stop in spans])[: len(parts)]

    def _swap(self, sent: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Send a tensor to each rank, and return those of `sizes` that they send."""
        if self.size == 1:
            return sent
        empty = torch.empty(0, dtype=torch.bfloat16, device=self.device)
        sent = [*sent, *[empty] * (self.size - len(sent))]
        sizes = [*sizes, *[0] * (self.size - len(sizes))]
        out = torch.empty(sum(sizes), dtype=torch.bfloat16, device=self.device)
        # as bytes, which every backend sends
        dist.all_to_all_single(
            out.view(torch.uint8),
            torch.cat(sent).view(torch.uint8),
            [2 * size for size in sizes],
            [2 * len(piece) for piece in sent],
            group=self.group,
        )
        return list(out.split(sizes))
