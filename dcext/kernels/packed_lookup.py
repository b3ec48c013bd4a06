"""PTX that turns the codes of packed weights into int8, eight at a time, with byte permutations.

A look-up in memory is a load for each weight, of which a multiprocessor starts at most 32 per clock: on an H100 (132 of
them, 1.7 GHz) 7.2e12 per second, where its HBM (3.35 TB/s) delivers 6.7e12 codes of 4 bits. ``prmt`` takes four bytes out
of eight at once, so that four weights from a table of 16 cost three of them, and the table stays in four registers.
"""

from __future__ import annotations

import triton


@triton.constexpr_function
def table_words(width: int) -> int:
    """Registers that hold the table of 2^width bytes; ``prmt`` reads two at a time."""
    return max(2, 2**width // 4)


@triton.constexpr_function
def stored_bytes(width: int) -> int:
    """Bytes that hold a pair of codes."""
    return 1 if width in (2, 4) else 2


@triton.constexpr_function
def lookup_asm(width: int, piece: int) -> str:
    """Assembly for ``tl.inline_asm_elementwise`` with ``pack=4``.

    The element-wise function behind it takes the bytes that hold a column c of a row and the column c + 16: of piece
    ``piece`` of four bits (width 4 and more), or ``piece % 2`` of two bits (2 and 3), in ``$2``; of the piece with the
    bits above, in ``$3`` (3, 5 and 6). The table's words follow, each four times, once for each element of a pack.
    ``$0`` and ``$1`` receive the weights of the columns c and of the columns c + 16.

    Codes are kept as they come, one in each half byte: the lowest three bits are an index for ``prmt``, each further
    bit chooses between two results of the step before.
    """
    words = table_words(width)
    table = [f"${2 + stored_bytes(width) + 4 * i}" for i in range(words)]
    two_bits = piece // 2 * 2  # where a two-bit piece holds these columns, in each half byte
    if width >= 4:
        index = ["and.b32 index, $2, 0x77777777;"]
        upper = {4: [], 5: [("$3", piece)], 6: [("$3", two_bits), ("$3", two_bits + 1)]}[width]
        choices = [("$2", 3), *upper]
    else:
        index = [f"shr.u32 index, $2, {two_bits};", "and.b32 index, index, 0x33333333;"]
        choices = []
        if width == 3:
            index += [*_bit_to_bit_2("bit", "$3", piece), "or.b32 index, index, bit;"]
    lines = [*index]
    for level, choice in enumerate(choices):
        lines += _bit_to_bit_2(f"choice{level}", *choice)
        lines.append(f"or.b32 choice{level}, choice{level}, 0x32103210;")
    for half in range(2):
        if half == 1:
            selectors = ["index", *(f"choice{level}" for level in range(len(choices)))]
            lines += [f"shr.u32 {selector}, {selector}, 16;" for selector in selectors]
        lines += _select(table, f"half{half}_", len(choices))
    lines += ["prmt.b32 $0, half0_0, half1_0, 0x6420;", "prmt.b32 $1, half0_0, half1_0, 0x7531;"]
    names = ["index", "bit", *(f"choice{level}" for level in range(3))]
    names += [f"half{half}_{i}" for half in range(2) for i in range(words // 2)]
    body = "\n".join([f".reg .b32 {', '.join(names)};", *lines])
    return f"{{\n{body}\n}}"


@triton.constexpr_function
def lookup_constraints(width: int) -> str:
    """What goes with it: two registers out, the others in."""
    return ",".join(["=r"] * 2 + ["r"] * (stored_bytes(width) + 4 * table_words(width)))


@triton.constexpr_function
def _bit_to_bit_2(target: str, operand: str, bit: int) -> list[str]:
    """Moves one bit of every half byte to its bit 2, and clears the others."""
    shift = f"shr.u32 {target}, {operand}, {bit - 2};"
    if bit < 2:
        shift = f"shl.b32 {target}, {operand}, {2 - bit};"
    return [shift, f"and.b32 {target}, {target}, 0x44444444;"]


@triton.constexpr_function
def _select(table: list[str], name: str, levels: int) -> list[str]:
    """Four weights from the lower four half bytes of the selectors, in ``{name}0``."""
    num = len(table) // 2
    lines = [f"prmt.b32 {name}{i}, {table[2 * i]}, {table[2 * i + 1]}, index;" for i in range(num)]
    for level in range(levels):
        num //= 2
        lines += [
            f"prmt.b32 {name}{i}, {name}{2 * i}, {name}{2 * i + 1}, choice{level};"
            for i in range(num)
        ]
    return lines
