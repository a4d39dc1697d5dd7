"""Attention: the one place where its kernel is chosen, and how it is split over the length of rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from euroflax.sharding import ACTIVATIONS, constrain, spec, ways

_BLOCK_LENGTH = 512
_MASKED = -1e30


def cached_attention(
    q_BLHK: Float[Array, "B L H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGK: Float[Array, "B S G K"],
    segment_ids_BL: Int[Array, "B L"],
    segment_ids_BS: Int[Array, "B S"],
    start: int | Int[Array, ""] = 0,
) -> Float[Array, "B L H K"]:
    """Causal attention within segments, of queries at places `start` to `start + L` of the S places of the keys.

    Each of the G key heads serves H / G query heads.
    """
    same_BLS = segment_ids_BL[:, :, None] == segment_ids_BS[:, None, :]
    causal_LS = start + jnp.arange(q_BLHK.shape[1])[:, None] >= jnp.arange(k_BSGK.shape[1])[None, :]
    mask_B1LS = (same_BLS & causal_LS)[:, None]
    return jax.nn.dot_product_attention(q_BLHK, k_BSGK, v_BSGK, mask=mask_B1LS, implementation="xla")


def balanced(values_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The places of a row in the order in which they lie on the mesh, so that causal masks cost each device the same.

    A row is cut into twice as many pieces as devices share it, and device i holds pieces i and 2 P - 1 - i
    (Llama team, "The Llama 3 herd of models", 2024, section 3.3.2). On one device nothing moves.
    """
    return _reorder(values_BL, _pieces(ways("L")))


def in_order(values: Array) -> Array:
    """Undoes `balanced` for an array of `[B, L, ...]`."""
    return _reorder(values, np.argsort(_pieces(ways("L"))))


def _pieces(devices: int) -> np.ndarray:
    """The number of each piece of a row, in the order in which they lie on the devices."""
    if devices == 1:
        return np.arange(1)
    return np.stack([np.arange(devices), 2 * devices - 1 - np.arange(devices)], axis=1).ravel()


def _reorder(values: jax.Array, order: np.ndarray) -> jax.Array:
    if len(order) == 1:
        return values
    pieces = values.reshape(values.shape[0], len(order), -1, *values.shape[2:])[:, order]
    return constrain(pieces.reshape(values.shape), "BLD"[: values.ndim])


def attend(
    q_BLHK: Float[Array, "B L H K"],
    k_BLGK: Float[Array, "B L G K"],
    v_BLGK: Float[Array, "B L G K"],
    segment_ids_BL: Int[Array, "B L"],
) -> Float[Array, "B L H K"]:
    """Causal attention within segments over whole rows, whose places lie as `balanced` has them.

    Each of the G key heads serves H / G query heads. Where devices share a row, each gathers the keys and values of
    all of them and attends from its own queries. Scores exist for two blocks of at most 512 places at a time, here and
    in the backward pass, and not for keys behind the queries: memory grows with the length and not with its square.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = ways("L")
    local = functools.partial(_attend_local, devices)
    if mesh.empty:
        return local(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)
    placed = [spec(letters, ACTIVATIONS) for letters in ("BLHK", "BLGK", "BLGK", "BL")]
    manual = set(mesh.axis_names) - set(mesh.manual_axes)
    mapped = jax.shard_map(local, in_specs=tuple(placed), out_specs=placed[0], axis_names=manual, check_vma=False)
    return mapped(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)


def _attend_local(devices: int, q: jax.Array, k: jax.Array, v: jax.Array, segments_BL: jax.Array) -> jax.Array:
    """The attention of one device's queries, `[B, L, H, K]` of its own rows, places and heads."""
    segments_BS, rank = segments_BL, 0
    if devices > 1:
        gather = functools.partial(jax.lax.all_gather, axis_name="sequence", axis=1, tiled=True)
        k, v, segments_BS, rank = gather(k), gather(v), gather(segments_BL), jax.lax.axis_index("sequence")
    block = _block_length(k.shape[1], devices)
    if block == k.shape[1]:
        return cached_attention(q, k, v, segments_BL, segments_BS)
    numbers, pairs = _block_table(k.shape[1], devices, block)
    queries = jnp.asarray(numbers.reshape(devices, -1))[rank]
    marks = (_split(segments_BL, block), _split(segments_BS, block), queries, jnp.asarray(numbers))
    q_XBGQK = _split(q, block, k.shape[2])
    out_XBGQK = _blockwise(q_XBGQK, _split(k, block), _split(v, block), marks, jnp.asarray(pairs)[rank])
    out_XBGHCK = out_XBGQK.reshape(*out_XBGQK.shape[:3], -1, block, q.shape[3])
    return out_XBGHCK.transpose(1, 0, 4, 2, 3, 5).reshape(q.shape)


def _split(values: jax.Array, block: int, groups: int | None = None) -> jax.Array:
    """`[B, L]` as blocks `[X, B, block]`, `[B, L, G, K]` as `[X, B, G, block, K]`, and queries as `[X, B, G, Q, K]`.

    Q are the heads of a group times the places of a block, so that every product is one of plain matrices.
    """
    blocks = values.reshape(values.shape[0], -1, block, *values.shape[2:])
    if values.ndim == 2:
        return blocks.transpose(1, 0, 2)
    if groups is None:
        return blocks.transpose(1, 0, 3, 2, 4)
    heads = blocks.reshape(*blocks.shape[:3], groups, -1, blocks.shape[4])
    return heads.transpose(1, 0, 3, 4, 2, 5).reshape(heads.shape[1], heads.shape[0], groups, -1, heads.shape[5])


def _block_length(length: int, devices: int) -> int:
    """Places in a block: the most that divide a piece of the row, up to 512; a whole piece where that is few."""
    piece = length // len(_pieces(devices))
    best = max(size for size in range(1, min(piece, _BLOCK_LENGTH) + 1) if piece % size == 0)
    return best if 4 * best >= min(piece, _BLOCK_LENGTH) else piece


@functools.cache
def _block_table(length: int, devices: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Where blocks lie in the row, and which of them meet.

    Returns:
        The number in the row of each block of keys as they lie; and for each device the pairs of (own block of
        queries, block of keys not behind it), `[devices, pairs, 2]`: as many on each device, thanks to `balanced`.
    """
    pieces = _pieces(devices)
    each = length // len(pieces) // block
    numbers = (pieces[:, None] * each + np.arange(each)).ravel().astype(np.int32)
    queries = numbers.reshape(devices, -1)
    pairs = [[(i, j) for i, own in enumerate(mine) for j, key in enumerate(numbers) if key <= own] for mine in queries]
    return numbers, np.asarray(pairs, np.int32)


Marks = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Segments of the queries and of the keys `[blocks, B, block]`, and the number of each block in the row."""


@jax.custom_vjp
def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks, pairs: jax.Array) -> jax.Array:
    """Attention over pairs of blocks with a running softmax (Dao et al., "FlashAttention", 2022, algorithms 1 and 4).

    Args:
        q: queries, `[X, B, G, Q, K]`.
        k: keys, `[X, B, G, S, K]`.
        v: values, as keys.
        marks: what the mask is made of.
        pairs: which block of queries meets which of keys, `[pairs, 2]`.
    """
    return _blockwise_forward(q, k, v, marks, pairs)[0]


def _blockwise_forward(q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks, pairs: jax.Array) -> tuple:
    def fold(carry: tuple, pair: jax.Array) -> tuple[tuple, None]:
        i, j = pair
        before, highest, normaliser = (part[i] for part in carry)
        scores = _scores(q, k, marks, pair)
        now = jnp.maximum(highest, scores.max(axis=-1))
        weights, shrink = jnp.exp(scores - now[..., None]), jnp.exp(highest - now)
        added = _product("BGQS,BGSK->BGQK", weights.astype(v.dtype), v[j])
        new = (before * shrink[..., None] + added, now, normaliser * shrink + weights.sum(axis=-1))
        return tuple(_put(whole, part, i) for whole, part in zip(carry, new, strict=True)), None

    start = (jnp.zeros(q.shape), jnp.full(q.shape[:-1], _MASKED), jnp.zeros(q.shape[:-1]))
    (sums, highest, normaliser), _ = jax.lax.scan(fold, start, pairs)
    out = (sums / normaliser[..., None]).astype(q.dtype)
    return out, (q, k, v, marks, pairs, out, highest + jnp.log(normaliser))


def _blockwise_backward(kept: tuple, change: jax.Array) -> tuple:
    q, k, v, marks, pairs, out, normaliser = kept
    ours = jnp.sum(change.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def fold(carry: tuple, pair: jax.Array) -> tuple[tuple, None]:
        i, j = pair
        weights = jnp.exp(_scores(q, k, marks, pair) - normaliser[i][..., None])
        of_weights = _product("BGQK,BGSK->BGQS", change[i], v[j])
        of_scores = (weights * (of_weights - ours[i][..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
        added = (
            _product("BGQS,BGSK->BGQK", of_scores, k[j]),
            _product("BGQS,BGQK->BGSK", of_scores, q[i]),
            _product("BGQS,BGQK->BGSK", weights.astype(change.dtype), change[i]),
        )
        places = (i, j, j)
        return tuple(_put(c, c[at] + new, at) for c, new, at in zip(carry, added, places, strict=True)), None

    start = tuple(jnp.zeros(values.shape) for values in (q, k, v))
    totals, _ = jax.lax.scan(fold, start, pairs)
    return *(total.astype(q.dtype) for total in totals), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _scores(q: jax.Array, k: jax.Array, marks: Marks, pair: jax.Array) -> jax.Array:
    """Scaled scores of a pair of blocks, `[B, G, Q, S]`; what the mask hides is far below all others."""
    i, j = pair
    of_queries, of_keys, numbers, key_numbers = marks
    places = jnp.arange(k.shape[3])
    causal_CS = numbers[i] * len(places) + places[:, None] >= key_numbers[j] * len(places) + places
    seen_BCS = (of_queries[i][:, :, None] == of_keys[j][:, None, :]) & causal_CS
    seen_BGQS = jnp.tile(seen_BCS, (1, q.shape[3] // len(places), 1))[:, None]
    scores_BGQS = _product("BGQK,BGSK->BGQS", q[i], k[j]) * q.shape[-1] ** -0.5
    return jnp.where(seen_BGQS, scores_BGQS, _MASKED)


def _product(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def _put(whole: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, part, index, 0)
