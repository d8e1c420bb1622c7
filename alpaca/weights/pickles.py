"""Which names a pickle looks up, read from its bytes: nothing of it runs."""

from __future__ import annotations

import io
import pickletools

# What torch.save writes for state dicts of plain tensors, in either format, and has written since 0.4. torch's own list
# for weights_only is longer: it has bytearray, to which a pickle of thirty bytes can give 64 GB as its length.
ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch.nn.parameter", "Parameter"),
}
ALLOWED |= {
    ("torch", f"{kind}Storage")
    for kind in "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexDouble ComplexFloat".split()
}
UNTOLD = "a name that it does not tell"
MEMO = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")  # these leave the stack as it is


def foreign_global(data: bytes, pickles: int) -> str | None:
    """The first name in so many pickles, one after the other, that a state dict has no need of; None without one.

    A pickle has no jumps, so every opcode is seen, however deep what it makes is nested and whatever the memo holds.
    The time grows with the bytes (a second for a million opcodes), and no length that they claim takes memory.

    Args:
        data: from the first pickle on; what stands behind the last is not looked at.
        pickles: how many.

    Raises:
        ValueError: what is there is no pickle, or has no end.
    """
    file = io.BytesIO(data)
    for _ in range(pickles):
        top: list[str | None] = [None, None]  # of the stack: strings, as far as the last two opcodes pushed them
        for opcode, argument, _position in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = argument.partition(" ")
            elif opcode.name == "STACK_GLOBAL":
                module, name = top
            elif opcode.name.startswith("EXT"):  # a number for a name
                module = name = None
            else:
                if opcode.name not in MEMO:
                    top = [top[1], argument if isinstance(argument, str) and "UNICODE" in opcode.name else None]
                continue
            top = [top[1], None]
            if module is None or name is None:
                return UNTOLD
            if (module, name) not in ALLOWED:
                return ascii(f"{module}.{name}")[1:-1][:100]
    return None
