"""PTX text -> Module: kernels with parameters, registers, variables, labels and instructions.

Syntax only: what an opcode means, and whether it is known, is decided in ``instructions``. The grammar is the part of
the PTX ISA (9.0) that nvcc emits; text that does not fit it is a PtxSyntaxError with its line. Bodies of ``.func`` are
skipped: code with calls is not run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .types import TYPES


class PtxSyntaxError(ValueError):
    """PTX text that the parser does not understand."""


# ------------------------------------------------------------------------------------------------ operands
@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    """A read-only register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Literal:
    """A constant: an integer, or the bits of a float (kind ``f32`` or ``f64``)."""

    value: int
    kind: str = "int"


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or parameter, plus a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Memory:
    """``[base + offset]``."""

    base: Register | Symbol | Literal
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """Two destinations, ``%r1|%p1``."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """``!%p1`` as a source."""

    register: Register


@dataclass(frozen=True)
class Sink:
    """``_``: a destination that is thrown away."""


Operand = Register | Special | Literal | Symbol | Memory | Vector | Pair | Negated | Sink


# ------------------------------------------------------------------------------------------------ declarations
@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: first word, such as ``ld``; modifiers: the rest, such as ``("global", "v4", "f32")``.
        predicate: register that guards it, or None; negated: ``@!``.
        line: 1-based line in the PTX text.
        source: (file number, line) of the CUDA source; then of the kernel's own line, where that was inlined.
    """

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    line: int
    text: str
    source: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Parameter:
    name: str
    size: int
    align: int


@dataclass(frozen=True)
class Variable:
    """A ``.shared``, ``.local``, ``.const`` or ``.global`` declaration; size 0 with ``external`` is dynamic shared."""

    name: str
    space: str
    size: int
    align: int
    external: bool = False
    initial: bytes | None = None


@dataclass
class Kernel:
    """One ``.entry``. ``registers`` maps name to type name, ``labels`` name to instruction index."""

    name: str
    params: list[Parameter]
    max_threads: int | None = None
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class Module:
    version: str = ""
    target: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ scanner
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_SPACE = re.compile(r"\s+")
_LABEL = re.compile(r"([$\w]+):(?!:)")
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")
_SPECIAL = re.compile(
    r"%(n?tid|n?ctaid)\.[xyz]$|%(laneid|warpid|nwarpid|lanemask_(eq|le|lt|ge|gt)|dynamic_smem_size|total_smem_size)$"
)
_INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)$", re.S)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.(?:global|const|shared|local)\s+)?(?:\.align\s+\d+\s+)?)?"
    r"([$\w]+)\s*(?:\[(\d+)\])?$"
)
_VARIABLE = re.compile(
    r"((?:\.(?:extern|visible|weak|common)\s+)*)\.(shared|local|const|global)\s+((?:\.attribute\([^)]*\)\s*)?)"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([$\w]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)


class _Scanner:
    """A cursor over the text that knows its line."""

    def __init__(self, text: str) -> None:
        # comments become spaces, so that lines keep their numbers
        self.text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
        self.position = 0

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.position) + 1

    def error(self, message: str) -> PtxSyntaxError:
        snippet = self.text[self.position : self.position + 60].split("\n")[0]
        return PtxSyntaxError(f"PTX line {self.line}: {message}: {snippet!r}")

    def skip_space(self) -> None:
        if match := _SPACE.match(self.text, self.position):
            self.position = match.end()

    def at_end(self) -> bool:
        self.skip_space()
        return self.position >= len(self.text)

    def peek(self, prefix: str) -> bool:
        return self.text.startswith(prefix, self.position)

    def until(self, stop: str) -> str:
        """Text up to ``stop``, which is passed over."""
        end = self.text.find(stop, self.position)
        if end < 0:
            raise self.error(f"expected {stop!r}")
        found = self.text[self.position : end]
        self.position = end + len(stop)
        return found

    def skip_block(self) -> None:
        """Pass over ``{ ... }`` with everything nested in it."""
        depth = 0
        while True:
            if self.position >= len(self.text):
                raise self.error("missing '}'")
            character = self.text[self.position]
            self.position += 1
            depth += (character == "{") - (character == "}")
            if character == "}" and depth == 0:
                return


def _split(text: str) -> list[str]:
    """Split at the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


# ------------------------------------------------------------------------------------------------ module level
def parse(text: str) -> Module:
    """Parse the text of one PTX module.

    Raises:
        PtxSyntaxError: text outside the grammar, with its line.
    """
    scanner = _Scanner(text)
    module = Module()
    while not scanner.at_end():
        if scanner.peek(".version"):
            module.version = scanner.until("\n").split()[1]
        elif scanner.peek(".target"):
            module.target = scanner.until("\n").split()[1].rstrip(",")
        elif scanner.peek(".address_size"):
            if scanner.until("\n").split()[1] != "64":
                raise scanner.error("only 64-bit addresses are supported")
        elif scanner.peek(".file"):
            words = scanner.until("\n").split(None, 2)
            module.files[int(words[1])] = words[2].split('"')[1]
        elif scanner.peek(".section"):
            scanner.until("\n")
            scanner.skip_space()
            scanner.skip_block()
        elif match := re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.entry\s+([$\w]+)\s*").match(
            scanner.text, scanner.position
        ):
            scanner.position = match.end()
            kernel = _parse_kernel(scanner, match[1])
            module.kernels[kernel.name] = kernel
        elif match := re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.func\b[^;{]*").match(
            scanner.text, scanner.position
        ):
            scanner.position = match.end()
            if scanner.peek("{"):
                scanner.skip_block()
            else:
                scanner.until(";")
        elif scanner.peek("."):
            variable = _parse_variable(scanner, scanner.until(";").strip())
            module.variables[variable.name] = variable
        else:
            raise scanner.error("unexpected text at module level")
    return module


def _parse_variable(scanner: _Scanner, text: str) -> Variable:
    match = _VARIABLE.match(text)
    if match is None or match[5] not in TYPES:
        raise scanner.error(f"declaration not understood: {' '.join(text.split())[:80]}")
    element = TYPES[match[5]].size
    counts = re.findall(r"\[(\d*)\]", match[7])
    size = element
    for count in counts:
        size *= int(count or 0)
    initial = None
    if match[8] is not None:
        values = [int(v, 0) for v in _split(match[8].strip().strip("{}"))]
        initial = b"".join((v & (1 << 8 * element) - 1).to_bytes(element, "little") for v in values).ljust(size, b"\0")
    return Variable(match[6], match[2], size, int(match[4] or element), ".extern" in match[1], initial)


def _parse_kernel(scanner: _Scanner, name: str) -> Kernel:
    params: list[Parameter] = []
    if scanner.peek("("):
        scanner.position += 1
        for declaration in _split(scanner.until(")")):
            match = _PARAM.match(declaration)
            if match is None:
                raise scanner.error(f"parameter not understood: {declaration}")
            element = TYPES[match[2]].size
            params.append(Parameter(match[3], element * int(match[4] or 1), int(match[1] or element)))
    kernel = Kernel(name, params)
    directives = scanner.until("{")
    if match := re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives):
        kernel.max_threads = int(match[1]) * int(match[2] or 1) * int(match[3] or 1)
    _Body(scanner, kernel).parse()
    return kernel


# ------------------------------------------------------------------------------------------------ kernel bodies
class _Body:
    """Parses the statements of one kernel; ``{}`` opens a scope with registers of its own."""

    def __init__(self, scanner: _Scanner, kernel: Kernel) -> None:
        self.scanner = scanner
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = [{}]  # name in the text -> unique name
        self.scope_count = 0
        self.source: tuple[tuple[int, int], ...] = ()
        self.callers: dict[tuple[str, ...], tuple[str, ...]] = {}  # place in the source -> where it was inlined

    def parse(self) -> None:
        scanner = self.scanner
        line, seen = scanner.line, scanner.position
        while True:
            scanner.skip_space()
            line += scanner.text.count("\n", seen, scanner.position)
            seen = scanner.position
            if scanner.position >= len(scanner.text):
                raise scanner.error(f"kernel {self.kernel.name} has no end")
            if scanner.peek("{"):
                scanner.position += 1
                self.scopes.append({})
                self.scope_count += 1
            elif scanner.peek("}"):
                scanner.position += 1
                self.scopes.pop()
                if not self.scopes:
                    break
            elif scanner.peek(".loc\t") or scanner.peek(".loc "):
                self._locate(scanner.until("\n"))
            elif match := _LABEL.match(scanner.text, scanner.position):
                scanner.position = match.end()
                self.kernel.labels[match[1]] = len(self.kernel.instructions)
            else:
                self._statement(scanner.until(";").strip(), line)
        missing = [
            o.name
            for i in self.kernel.instructions
            if i.opcode == "bra"
            for o in i.operands
            if isinstance(o, Symbol) and o.name not in self.kernel.labels
        ]
        if missing:
            raise PtxSyntaxError(f"kernel {self.kernel.name}: branch to unknown label {missing[0]}")

    def _locate(self, text: str) -> None:
        """Note a ``.loc file line column[, function_name f, inlined_at file line column]``."""
        words = text.replace(",", " ").split()
        place = tuple(words[1:4])
        if "inlined_at" in words:
            self.callers[place] = tuple(words[words.index("inlined_at") + 1 :][:3])
        else:
            self.callers.pop(place, None)
        outermost, seen = place, {place}
        while (caller := self.callers.get(outermost)) is not None and caller not in seen:
            outermost = caller
            seen.add(caller)
        if place[1] != "0":  # line 0 marks code without a source line: keep the last real one
            places = [place] if outermost == place else [place, outermost]
            self.source = tuple((int(p[0]), int(p[1])) for p in places)

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._declare_registers(text)
        elif text.startswith((".shared", ".local", ".extern", ".const", ".global")):
            self.kernel.variables.append(_parse_variable(self.scanner, text))
        elif text.startswith((".pragma", ".param")):
            pass  # unroll hints; argument space of calls, which are refused as unknown instructions
        elif match := _INSTRUCTION.match(text):
            predicate = self._lookup(match[2]) if match[2] else None
            # the argument lists of a call have a syntax of their own; calls are refused later, by name
            operands = () if match[3] == "call" else tuple(self._operand(o) for o in _split(match[5]))
            modifiers = tuple(match[4].split(".")[1:])
            self.kernel.instructions.append(
                Instruction(
                    match[3], modifiers, operands, predicate, bool(match[1]), line, " ".join(text.split()), self.source
                )
            )
        else:
            raise PtxSyntaxError(f"PTX line {line}: statement not understood: {text[:80]!r}")

    def _declare_registers(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S)
        if match is None or match[1] not in TYPES:
            raise self.scanner.error(f"register declaration not understood: {text[:80]!r}")
        for item in _split(match[2]):
            if many := re.match(r"([%$\w]+)<(\d+)>$", item):
                names = [f"{many[1]}{i}" for i in range(int(many[2]))]
            else:
                names = [item]
            for name in names:
                # an inner scope may reuse a name: give it a unique one
                unique = name if len(self.scopes) == 1 else f"{name}#{self.scope_count}"
                self.scopes[-1][name] = unique
                self.kernel.registers[unique] = match[1]

    def _lookup(self, name: str) -> str | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def _operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(t) for t in _split(text[1:-1])))
        if text.startswith("["):
            return self._memory(text[1:-1].strip())
        if text.startswith("!"):
            register = self._operand(text[1:])
            if not isinstance(register, Register):
                raise self.scanner.error(f"'!' before something that is no register: {text}")
            return Negated(register)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip()), self._operand(second.strip()))
        if (unique := self._lookup(text)) is not None:
            return Register(unique)
        if _SPECIAL.match(text):
            return Special(text)
        if text[:2] in ("0f", "0F") and len(text) == 10:
            return Literal(int(text[2:], 16), "f32")
        if text[:2] in ("0d", "0D") and len(text) == 18:
            return Literal(int(text[2:], 16), "f64")
        if _NUMBER.match(text):
            return Literal(int(text.rstrip("U"), 0))
        if text == "WARP_SZ":
            return Literal(32)
        if match := re.match(r"([$A-Za-z_][$\w]*)\s*(?:\+\s*(-?\d+))?$", text):
            return Symbol(match[1], int(match[2] or 0))
        raise self.scanner.error(f"operand not understood: {text}")

    def _memory(self, text: str) -> Memory:
        match = re.match(r"(.+?)\s*(?:\+\s*(-?(?:0[xX][0-9a-fA-F]+|\d+)))?$", text, re.S)
        base = self._operand(match[1]) if match else None
        if match is None or not isinstance(base, (Register, Symbol, Literal)):
            raise self.scanner.error(f"address not understood: [{text}]")
        return Memory(base, int(match[2] or "0", 0))
