"""The parts that each adapter type keeps for a module, and the weight that they fit: from shapes alone, no torch.

A function takes the parts' shapes, the config's options and the base weight's (O, I), or (0, 0) without a base. It
returns the (O, I) that the parts are made for; a side that they leave open is the base's. I counts a kernel's elements.
Raises KeyError for a missing part, and ValueError saying which shapes do not fit together.
"""

from collections.abc import Mapping
from math import isqrt, prod

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Options = Mapping[str, bool | int | float | str]
Size = tuple[int, int]


def lora(prefix: str, shapes: Shapes, options: Options, base: Size) -> Size:
    """A (R, I) and B (O, R): AdaLoRA (with E), DeLoRA, HiRA, UniLoRA."""
    (rank, inputs), (outputs, other) = _dims(shapes, f"{prefix}A", 2), _dims(shapes, f"{prefix}B", 2)
    _require(rank == other, shapes, f"{prefix}A", f"{prefix}B")
    return outputs, inputs


def adalora(shapes: Shapes, options: Options, base: Size) -> Size:
    """lora_E (R, 1): the singular values between the factors."""
    _require(_dims(shapes, "lora_E", 2) == (_dims(shapes, "lora_A", 2)[0], 1), shapes, "lora_E", "lora_A")
    return lora("lora_", shapes, options, base)


def delora(shapes: Shapes, options: Options, base: Size) -> Size:
    """delora_lambda (1), delora_w_norm (I)."""
    _require(_dims(shapes, "delora_lambda", 1) == (1,), shapes, "delora_lambda")
    size = lora("delora_", shapes, options, base)
    _require(_dims(shapes, "delora_w_norm", 1) == (size[1],), shapes, "delora_w_norm", "delora_A")
    return size


def hira(shapes: Shapes, options: Options, base: Size) -> Size:
    """An embedding's factors have names of their own."""
    return lora("hira_embedding_" if "hira_embedding_A" in shapes else "hira_", shapes, options, base)


def unilora(shapes: Shapes, options: Options, base: Size) -> Size:
    """Indices into theta and scales, in the factors' shapes."""
    for side in "AB":
        same = shapes[f"unilora_indices_{side}"] == shapes[f"unilora_scales_{side}"]
        _require(same, shapes, f"unilora_indices_{side}", f"unilora_scales_{side}")
    _dims(shapes, "unilora_theta_d", 1)
    return lora("unilora_indices_", shapes, options, base)


def loha(shapes: Shapes, options: Options, base: Size) -> Size:
    """w1_a (O, R), w1_b (R, I) and the same for w2; with t1, t2 (R, R, *kernel) the first is (R, O)."""
    sizes: list[Size] = []
    for side in "12":
        first, second = _dims(shapes, f"hada_w{side}_a", 2), _dims(shapes, f"hada_w{side}_b", 2)
        kernel: Shape = ()
        if f"hada_t{side}" in shapes:
            core, kernel = shapes[f"hada_t{side}"][:2], shapes[f"hada_t{side}"][2:]
            _require(core == (first[0], second[0]), shapes, f"hada_t{side}", f"hada_w{side}_a")
            first = first[::-1]
        _require(first[1] == second[0], shapes, f"hada_w{side}_a", f"hada_w{side}_b")
        sizes.append((first[0], second[1] * prod(kernel)))
    _require(sizes[0] == sizes[1], shapes, "hada_w1_a", "hada_w2_a")
    return sizes[0]


def lokr(shapes: Shapes, options: Options, base: Size) -> Size:
    """w1 and w2, each in full or as a product of w_a and w_b; w2 may have a kernel or a core t2 (R, R, *kernel)."""
    (rows_1, columns_1), (rows_2, columns_2) = _kronecker(shapes, "lokr_w1"), _kronecker(shapes, "lokr_w2")
    return rows_1 * rows_2, columns_1 * columns_2


def _kronecker(shapes: Shapes, name: str) -> Size:
    if name in shapes:
        shape = shapes[name]
        _require(len(shape) in ((2, 3, 4) if name == "lokr_w2" else (2,)), shapes, name)
        return shape[0], prod(shape[1:])
    first, second = _dims(shapes, f"{name}_a", 2), _dims(shapes, f"{name}_b", 2)
    if name == "lokr_w2" and "lokr_t2" in shapes:
        core = _dims(shapes, "lokr_t2", 4)
        _require(core[:2] == (first[0], second[0]), shapes, "lokr_t2", f"{name}_a")
        return first[1], second[1] * prod(core[2:])
    _require(first[1] == second[0], shapes, f"{name}_a", f"{name}_b")
    return first[0], second[1]


def deft(shapes: Shapes, options: Options, base: Size) -> Size:
    """P (O, R) and R (R, I); with `para` (PaRa), P alone."""
    outputs, rank = _dims(shapes, "deft_P", 2)
    if options["para"]:
        return outputs, base[1]
    height, inputs = _dims(shapes, "deft_R", 2)
    _require(rank == height, shapes, "deft_P", "deft_R")
    return outputs, inputs


def beft(shapes: Shapes, options: Options, base: Size) -> Size:
    """A bias (1, O)."""
    rows, outputs = _dims(shapes, "beft_bias", 2)
    _require(rows == 1, shapes, "beft_bias")
    return outputs, base[1]


def glora(shapes: Shapes, options: Options, base: Size) -> Size:
    """A, B: (O, I), (O, 1) or (1); C: (I, 1); D, E: (O) or (1)."""
    A, B, C, D, E = (_glora_path(shapes, f"glora_{path}") for path in "ABCDE")
    inputs, outputs = C[0], next((shape[0] for shape in (A, B, D, E) if shape != (1,)), base[0])
    weight, bias = ((1,), (outputs, 1), (outputs, inputs)), ((1,), (outputs,))
    for path, shape, fits in zip("ABCDE", (A, B, C, D, E), (weight, weight, ((inputs, 1),), bias, bias), strict=True):
        _require(shape in fits, shapes, *(name for name in shapes if name.startswith(f"glora_{path}.")))
    return outputs, inputs


def _glora_path(shapes: Shapes, path: str) -> Shape:
    """The shape of Xd @ Xu, or of X, or of the zeros that PEFT saves for a path that is off."""
    if f"{path}.Xd" not in shapes:
        return shapes[f"{path}.zeros"] if f"{path}.zeros" in shapes else shapes[f"{path}.X"]
    (rows, rank), (height, columns) = _dims(shapes, f"{path}.Xd", 2), _dims(shapes, f"{path}.Xu", 2)
    _require(rank == height, shapes, f"{path}.Xd", f"{path}.Xu")
    return rows, columns


def ia3(shapes: Shapes, options: Options, base: Size) -> Size:
    """l (O, 1) scales outputs; (1, I) of a feed-forward module scales inputs."""
    rows, columns = _dims(shapes, "ia3_l", 2)
    _require(1 in (rows, columns), shapes, "ia3_l")
    return (rows, base[1]) if columns == 1 else (base[0], columns)


def vera(prefix: str, shapes: Shapes, options: Options, base: Size) -> Size:
    """lambda_b (O), lambda_d (R); A (R, at least I) and B (at least O, R) are shared. PVeRA's A and lambda_d are twice
    as high: mean, then variance."""
    (outputs,), (rank,) = _dims(shapes, f"{prefix}lambda_b", 1), _dims(shapes, f"{prefix}lambda_d", 1)
    (height, widest), (tallest, other) = _dims(shapes, f"{prefix}A", 2), _dims(shapes, f"{prefix}B", 2)
    both = 2 if prefix == "pvera_" else 1
    _require(rank == height == both * other, shapes, f"{prefix}lambda_d", f"{prefix}A")
    _require(outputs <= tallest, shapes, f"{prefix}lambda_b", f"{prefix}B")
    _require(base[1] <= widest, shapes, f"{prefix}A")
    return outputs, base[1]


def randlora(shapes: Shapes, options: Options, base: Size) -> Size:
    """lambda (R, bases), gamma (bases, the smaller side); A (R, 1, at least the smaller side), B (at least the larger
    side, at least bases, R)."""
    (rank, bases), gamma = _dims(shapes, "randlora_lambda", 2), _dims(shapes, "randlora_gamma", 2)
    A, B = _dims(shapes, "randlora_A", 3), _dims(shapes, "randlora_B", 3)
    _require(gamma[0] == bases, shapes, "randlora_gamma", "randlora_lambda")
    _require(A[0] == rank == B[2] and A[1] == 1 and B[1] >= bases, shapes, "randlora_A", "randlora_B")
    smaller, larger = min(base) or gamma[1], max(base)
    _require(gamma[1] == smaller <= A[2] and larger <= B[0], shapes, "randlora_gamma", "randlora_B")
    return base


def vblora(shapes: Shapes, options: Options, base: Size) -> Size:
    """Logits over the bank's vectors, or the best ones' indices and all but the last of their weights."""
    _, length = _dims(shapes, "vblora_vector_bank", 2)
    rank, columns = _chosen(shapes, "vblora_logits_A", options)
    rows, other = _chosen(shapes, "vblora_logits_B", options)
    _require(rank == other, shapes, *(name for name in shapes if name.startswith("vblora_logits")))
    return rows * length, columns * length


def _chosen(shapes: Shapes, name: str, options: Options) -> Size:
    vectors, best = shapes["vblora_vector_bank"][0], int(options["topk"])
    if name in shapes:
        *size, count = _dims(shapes, name, 3)
        _require(count == vectors and 0 < best <= vectors, shapes, name, "vblora_vector_bank")
    else:
        *size, count = _dims(shapes, f"{name}_topk_indices", 3)
        weights = _dims(shapes, f"{name}_topk_weights", 3)
        _require(weights == (*size, count - 1), shapes, f"{name}_topk_indices", f"{name}_topk_weights")
    return size[0], size[1]


def gralora(shapes: Shapes, options: Options, base: Size) -> Size:
    """A (G, I/G, R) and B (G, R, O/G), R a multiple of G; beside them a plain pair of rank hybrid_r."""
    (blocks, width, rank), (other, height, depth) = _dims(shapes, "gralora_A", 3), _dims(shapes, "gralora_B", 3)
    _require(blocks == other and rank == height and rank % blocks == 0, shapes, "gralora_A", "gralora_B")
    size = (blocks * depth, blocks * width)
    hybrid = int(options["hybrid_r"])
    if hybrid:
        fits = shapes["gralora_A_general"] == (hybrid, size[1]) and shapes["gralora_B_general"] == (size[0], hybrid)
        _require(fits, shapes, "gralora_A_general", "gralora_B_general")
    return size


def oft(shapes: Shapes, options: Options, base: Size) -> Size:
    """R (blocks, b(b-1)/2): the upper entries of skew matrices; with block_share one for all."""
    blocks, entries = _dims(shapes, "oft_R", 2)
    side = oft_block(entries)
    _require(side * (side - 1) // 2 == entries > 0, shapes, "oft_R")
    if not options["block_share"]:
        return base[0], blocks * side
    _require(blocks == 1 and base[1] % side == 0, shapes, "oft_R")
    return base


def oft_block(entries: int) -> int:
    """The side of a square matrix with `entries` entries above its diagonal."""
    return (1 + isqrt(1 + 8 * entries)) // 2


def boft(shapes: Shapes, options: Options, base: Size) -> Size:
    """R (1, blocks, b, b), s (O, 1). With more than one factor the blocks are permuted, which is not supported."""
    factors, blocks, side, other = _dims(shapes, "boft_R", 4)
    outputs, one = _dims(shapes, "boft_s", 2)
    if factors > 1:
        way_out = "merge it with PEFT, or train with boft_n_butterfly_factor=1"
        raise ValueError(f"{factors} butterfly factors, whose permutations are not read: {way_out}")
    _require(factors == 1 and side == other and one == 1, shapes, "boft_R", "boft_s")
    return outputs, blocks * side


def hra(shapes: Shapes, options: Options, base: Size) -> Size:
    """u (I, R): a Householder vector a column."""
    return base[0], _dims(shapes, "hra_u", 2)[0]


def miss(shapes: Shapes, options: Options, base: Size) -> Size:
    """block (R, O); `mini`: (R, a part of O); `bat`: (O/R, R, R)."""
    if options["init_weights"] == "bat":
        rows, rank, other = _dims(shapes, "miss_block", 3)
        _require(rank == other > 0 and base[1] % rank == 0, shapes, "miss_block")
        return rows * rank, base[1]
    rank, outputs = _dims(shapes, "miss_block", 2)
    _require(rank > 0 and outputs > 0, shapes, "miss_block")
    if options["init_weights"] != "mini":
        return outputs, base[1]
    _require(outputs == options["mini_r"] and base[0] % outputs == 0, shapes, "miss_block")
    return base


def c3a(shapes: Shapes, options: Options, base: Size) -> Size:
    """kernel (O/b, I/b, b)."""
    rows, columns, side = _dims(shapes, "c3a_kernel", 3)
    return rows * side, columns * side


def road(shapes: Shapes, options: Options, base: Size) -> Size:
    """theta and alpha: O/2 for road_1, O for road_2, 2 O for road_4; groups of an even size."""
    (angles,), (scales,) = _dims(shapes, "road_theta", 1), _dims(shapes, "road_alpha", 1)
    group, variant = int(options["group_size"]), str(options["variant"])
    outputs = {"road_1": 2 * angles, "road_2": angles, "road_4": angles // 2}[variant]
    _require(angles == scales, shapes, "road_theta", "road_alpha")
    fits = group > 0 and group % 2 == 0 and outputs % group == 0 and (variant != "road_4" or angles % 2 == 0)
    _require(fits, shapes, "road_theta")
    return outputs, base[1]


def fourierft(shapes: Shapes, options: Options, base: Size) -> Size:
    """spectrum (n): n_frequency of the O * I frequencies; another number would be drawn at other positions."""
    (count,) = _dims(shapes, "fourierft_spectrum", 1)
    if count != options["n_frequency"]:
        raise ValueError(f"{count} coefficients, where the config's n_frequency is {options['n_frequency']}")
    _require(0 in base or count <= base[0] * base[1], shapes, "fourierft_spectrum")
    return base


def supertuning(shapes: Shapes, options: Options, base: Size) -> Size:
    """values (n) and their positions (n) in the flat weight; with an r also a plain pair."""
    _dims(shapes, "supertuning_values", 1)
    _require(
        shapes["supertuning_values"] == shapes["supertuning_indices"],
        shapes, "supertuning_values", "supertuning_indices",
    )  # fmt: skip
    if not options["r"]:
        return base
    _require(_dims(shapes, "supertuning_lora_A", 2)[0] == options["r"], shapes, "supertuning_lora_A")
    return lora("supertuning_lora_", shapes, options, base)


def shira(shapes: Shapes, options: Options, base: Size) -> Size:
    """weight (n) and its positions (2, n): rows, then columns."""
    (count,) = _dims(shapes, "shira_weight", 1)
    _require(_dims(shapes, "shira_indices", 2) == (2, count), shapes, "shira_weight", "shira_indices")
    return base


def _dims(shapes: Shapes, name: str, count: int) -> Shape:
    """Only AdaLoRA's budget can leave a module nothing at all."""
    _require(len(shapes[name]) == count and (0 not in shapes[name] or name.startswith("lora_")), shapes, name)
    return shapes[name]


def _require(fits: bool, shapes: Shapes, *names: str) -> None:
    if not fits:
        listed = ", ".join(f"{name} {' x '.join(map(str, shapes[name])) or 'scalar'}" for name in names)
        raise ValueError(f"shapes that do not go together: {listed}")
