"""How packed tokens form sequences: the one way attention learns which token sees which.

Invariant: every packed token is produced exactly once, and no T x T mask ever exists.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Self

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of tensors that are copied to a device together
MAX_BUCKETS = 4
MIN_SAVING = 0.1  # a further bucket must cut this share of the padded work, to pay for its kernel launches
LINEAR_COST = 128  # a row of length L costs about L * (L + LINEAR_COST): attention plus gathering


@dataclass(frozen=True)
class Bucket:
    """Rows of similar length. `pad_index # [B, L]` gathers packed tokens; rows are padded on the right."""

    pad_index: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.pad_index.shape[0], self.pad_index.shape[1]


@dataclass(frozen=True)
class SequenceLayout:
    """Packed tokens [T] cut into segments; a segment sees its parent segment (whole), then itself causally.

    cu_seqlens # [S + 1] int64, parent # [S] int64 (-1: none), position_ids # [T] int64, segment_ids # [T] int64.
    buckets: padded rows; restore # [T]: where each token's output lies in the concatenated flattened rows.
    identity: the rows are the packed tokens in order, so gathering is a view.
    uses # [U] int64: places in the concatenated flattened rows that hold a token, not padding, in the order of tokens.
    use_starts # [T + 1] int64: token t is at uses[use_starts[t] : use_starts[t + 1]]; of a shared prompt in many rows.
    """

    cu_seqlens: Tensor
    parent: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    buckets: tuple[Bucket, ...]
    restore: Tensor
    uses: Tensor
    use_starts: Tensor
    identity: bool = False

    @classmethod
    def from_segments(
        cls,
        cu_seqlens: Tensor | list[int] | np.ndarray,
        parent: Tensor | list[int] | np.ndarray | None = None,
        position_ids: Tensor | None = None,
        few_shapes: bool = False,
    ) -> Self:
        """Segment s holds the tokens cu_seqlens[s]:cu_seqlens[s+1]; parent[s] is the segment it continues, or -1.

        cu_seqlens # [S + 1] strictly increasing from 0; parent # [S]; parents have no parents.
        position_ids # [T]: default is the position within (parent + segment). few_shapes: rows are padded to one of
        few lengths, for fused attention that makes a plan for each shape (cuDNN's takes 0.15 s).
        Built with numpy on the host, then moved to the device of cu_seqlens. AssertionError on a broken structure.
        """
        device = cu_seqlens.device if isinstance(cu_seqlens, Tensor) else torch.device("cpu")
        cu = _to_numpy(cu_seqlens)  # [S + 1]
        starts, lengths = cu[:-1], np.diff(cu)  # [S]
        num_segments, num_tokens = len(lengths), int(cu[-1])
        assert cu[0] == 0 and (lengths > 0).all(), f"cu_seqlens must rise strictly from 0, got {cu.tolist()}"
        par = np.full(num_segments, -1) if parent is None else _to_numpy(parent)  # [S]
        assert len(par) == num_segments, f"{len(par)} parents for {num_segments} segments"
        assert ((par >= -1) & (par < num_segments)).all(), f"parent out of range: {par.tolist()}"
        child = par >= 0
        assert (par[par[child]] < 0).all(), f"a parent has a parent itself: {par.tolist()}"
        parent_start = np.where(child, starts[par], starts)  # [S]
        parent_length = np.where(child, lengths[par], 0)  # [S]
        totals = parent_length + lengths

        # A parent needs no row of its own: its outputs are the first columns of its first child's row.
        first_child = np.full(num_segments, -1)
        first_child[par[child][::-1]] = np.flatnonzero(child)[::-1]
        has_row = first_child < 0
        rows = np.flatnonzero(has_row)
        rows = rows[np.argsort(totals[rows], kind="stable")]  # short to long
        producer = np.where(has_row, np.arange(num_segments), first_child)  # the segment whose row yields s
        shift = np.where(has_row, parent_length, 0)  # the column of its first token there

        # Where each row begins in the concatenated flattened buckets.
        row_start = np.zeros(num_segments, dtype=np.int64)
        buckets, held, offset = [], [], 0
        for members in _split_rows(rows, totals[rows]):
            length = int(totals[members].max())
            length = _one_of_few(length) if few_shapes else length
            column = np.arange(length)[None]  # [1, L]
            p_start, p_length = parent_start[members, None], parent_length[members, None]  # [B, 1]
            own = starts[members, None] + column - p_length  # [B, L]
            index = np.where(column < p_length, p_start + column, own)
            # Padding repeats the row's first token; causal attention hides it from every real token.
            first = np.where(p_length > 0, p_start, starts[members, None])  # [B, 1]
            within = column < totals[members, None]
            index = np.where(within, index, first)
            held.append(np.where(within, index, num_tokens).flatten())  # num_tokens: padding
            row_start[members] = offset + np.arange(len(members)) * length
            offset += index.size
            buckets.append(Bucket(torch.from_numpy(index)))

        tokens = np.concatenate(held)  # of each place
        use_starts = np.concatenate(([0], np.cumsum(np.bincount(tokens, minlength=num_tokens + 1)[:num_tokens])))
        uses = np.argsort(tokens, kind="stable")[: use_starts[-1]]

        segment_ids = np.repeat(np.arange(num_segments), lengths)  # [T]
        within = np.arange(num_tokens) - starts[segment_ids]  # [T]
        restore = row_start[producer][segment_ids] + shift[segment_ids] + within  # [T]
        identity = len(buckets) == 1 and offset == num_tokens and bool((restore == np.arange(num_tokens)).all())
        if position_ids is None:
            position_ids = torch.from_numpy(parent_length[segment_ids] + within)
        assert position_ids.shape == (num_tokens,), f"{tuple(position_ids.shape)} position_ids for {num_tokens} tokens"
        return cls(
            cu_seqlens=torch.from_numpy(cu),
            parent=torch.from_numpy(par),
            position_ids=position_ids,
            segment_ids=torch.from_numpy(segment_ids),
            buckets=tuple(buckets),
            restore=torch.from_numpy(restore),
            uses=torch.from_numpy(uses),
            use_starts=torch.from_numpy(use_starts),
            identity=identity,
        ).to(device)

    @classmethod
    def from_batch(cls, batch: int, length: int, device: torch.device | str = "cpu") -> Self:
        """The layout of plain inputs [B, T], flattened: B causal sequences of equal length."""
        return cls.from_segments(np.arange(batch + 1) * length).to(device)

    @cached_property
    def places(self) -> Tensor:
        """[P] int64: the token at each place of the concatenated flattened rows."""
        return torch.cat([bucket.pad_index.flatten() for bucket in self.buckets])

    def __len__(self) -> int:
        """Number of packed tokens T."""
        return self.restore.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """The same layout with its index tensors on another device."""
        if self.restore.device == torch.device(device):
            return self
        names = ("cu_seqlens", "parent", "position_ids", "segment_ids", "restore", "uses", "use_starts")
        tensors = [getattr(self, name) for name in names] + [b.pad_index for b in self.buckets]
        on_device = moved(tensors, device)
        buckets = tuple(Bucket(index) for index in on_device[len(names) :])
        return replace(self, buckets=buckets, **dict(zip(names, on_device)))

    def gather(self, x: Tensor) -> list[Tensor]:
        """Packed x # [T, ...] -> for each bucket its padded rows # [B, L, ...]."""
        if self.identity:
            return [x.unflatten(0, self.buckets[0].shape)]
        # index_select: its backward is one index_add; x[index] would sort the indices instead.
        return [x.index_select(0, b.pad_index.flatten()).unflatten(0, b.shape) for b in self.buckets]

    def scatter(self, rows: list[Tensor]) -> Tensor:
        """The inverse of gather: each bucket's rows # [B, L, ...] -> packed # [T, ...]."""
        flat = [x.flatten(0, 1) for x in rows]
        if self.identity:
            return flat[0]
        return (flat[0] if len(flat) == 1 else torch.cat(flat)).index_select(0, self.restore)

    def repeat_parents(self, tail: int | None = None) -> tuple[Tensor, Self]:
        """(token_index # [T'], layout): each child gets a copy of its parent's last `tail` tokens (None: all of them).

        For computations in which a prompt's last tokens depend on what follows, as in multi-token prediction. What is
        left of a parent stays shared.
        """
        if tail == 0 or bool((self.parent < 0).all()):
            return torch.arange(len(self), device=self.restore.device), self
        cu, par = self.cu_seqlens.tolist(), self.parent.tolist()
        children: dict[int, list[int]] = {}
        for s, p in enumerate(par):
            children.setdefault(p, []).append(s)
        pieces, lengths, parents = [], [], []
        for root in children[-1]:
            start, stop = cu[root], cu[root + 1]
            split = stop if root not in children else start if tail is None else max(stop - tail, start)
            parent = len(lengths) if split > start else -1
            if split > start:
                pieces.append(np.arange(start, split))
                lengths.append(split - start)
                parents.append(-1)
            for s in children.get(root, []):
                pieces += [np.arange(split, stop), np.arange(cu[s], cu[s + 1])]
                lengths.append(stop - split + cu[s + 1] - cu[s])
                parents.append(parent)
        index = torch.from_numpy(np.concatenate(pieces)).to(self.restore.device)  # [T']
        cu_rows = np.concatenate(([0], np.cumsum(lengths)))
        layout = type(self).from_segments(cu_rows, parents, self.position_ids[index].cpu())
        return index, layout.to(self.restore.device)


def _one_of_few(length: int) -> int:
    """Rounded up to one of eight lengths between two powers of two, and to a multiple of 64."""
    step = max(64, (1 << length.bit_length()) // 16)
    return -(-length // step) * step


def moved(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors on another device; from the host to a GPU in one copy.

    The host does not wait for a GPU: from memory that is not pinned it would, until all that was launched before is
    done.
    """
    if torch.device(device).type != "cuda":
        return [x.to(device) for x in tensors]
    here = [x for x in tensors if x.device.type == "cpu"]
    sizes = [x.numel() * x.element_size() for x in here]
    starts = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    for x, start, size in zip(here, starts, sizes):
        host[start : start + size].view(x.dtype).copy_(x.reshape(-1))
    there = host.to(device, non_blocking=True)
    parts = (there[i : i + size].view(x.dtype).view(x.shape) for x, i, size in zip(here, starts, sizes))
    return [next(parts) if x.device.type == "cpu" else x.to(device) for x in tensors]


def _to_numpy(x: Tensor | list[int] | np.ndarray) -> np.ndarray:
    return (x.cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)).astype(np.int64)


def _split_rows(rows: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Cut rows, sorted by length # [R], into at most MAX_BUCKETS runs so that little work is spent on padding."""
    # Candidate cuts: between different lengths, at most 32 of them, so that the search below stays cheap.
    cuts = np.flatnonzero(np.diff(lengths)) + 1
    if len(cuts) > 32:
        cuts = cuts[np.linspace(0, len(cuts) - 1, 32).astype(int)]
    edges = np.concatenate(([0], cuts, [len(rows)]))  # [n + 1]
    longest = lengths[edges[1:] - 1].astype(float)  # [n]
    # cost[i, j]: one bucket over rows edges[i]:edges[j+1].
    count = edges[1:][None] - edges[:-1][:, None]
    cost = np.where(count > 0, count * longest * (longest + LINEAR_COST), np.inf)
    best, choices, plan = cost[0], [], [[0, len(rows)]]
    total = best[-1]
    for _ in range(MAX_BUCKETS - 1):
        # best[j]: cheapest cover of the runs up to j; the last bucket starts at run i, after the cover up to i - 1.
        table = best[:-1, None] + cost[1:, :]
        if table.size == 0:
            break
        choices.append(table.argmin(0) + 1)
        best = table.min(0)
        if best[-1] > (1 - MIN_SAVING) * total:
            break
        total, stop, bounds = best[-1], len(edges) - 2, [len(rows)]
        for choice in reversed(choices):
            start = choice[stop]
            bounds.append(int(edges[start]))
            stop = start - 1
        plan.append([0, *reversed(bounds)])
    return np.split(rows, plan[-1][1:-1])
