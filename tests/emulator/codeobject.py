"""Code objects: ELF symbols and segments, kernel descriptors, metadata, disassembly.

Only the Python standard library is used, except that instruction decoding is
left to LLVM: ``llvm-objdump -d`` prints the text that :func:`parse_line` reads.
Layouts follow the LLVM "User Guide for AMDGPU Backend" (code object V3..V6:
"Kernel Descriptor for GFX6-GFX12", "Code Object Metadata").
"""

import bisect
import re
import shutil
import struct
import subprocess
import tempfile

from .errors import CodeObjectError

NT_AMDGPU_METADATA = 32
_MACH = {
    0x3F: "gfx90a",
    0x4C: "gfx942",
    0x40: "gfx940",
    0x4B: "gfx941",
    0x4F: "gfx950",
    0x30: "gfx908",
    0x2C: "gfx900",
    0x2F: "gfx906",
}


# --------------------------------------------------------------------------- msgpack
def unpack_msgpack(data):
    """Decode one MessagePack value (the subset code-object metadata uses)."""
    value, _ = _msgpack(data, 0)
    return value


def _msgpack(d, i):
    tag = d[i]
    i += 1
    if tag <= 0x7F:
        return tag, i
    if tag >= 0xE0:
        return tag - 256, i
    if 0x80 <= tag <= 0x8F:
        return _msgpack_map(d, i, tag & 15)
    if 0x90 <= tag <= 0x9F:
        return _msgpack_list(d, i, tag & 15)
    if 0xA0 <= tag <= 0xBF:
        n = tag & 31
        return d[i : i + n].decode(), i + n
    fixed = {0xC0: None, 0xC2: False, 0xC3: True}
    if tag in fixed:
        return fixed[tag], i
    numbers = {
        0xCA: ">f",
        0xCB: ">d",
        0xCC: ">B",
        0xCD: ">H",
        0xCE: ">I",
        0xCF: ">Q",
        0xD0: ">b",
        0xD1: ">h",
        0xD2: ">i",
        0xD3: ">q",
    }
    if tag in numbers:
        fmt = numbers[tag]
        return struct.unpack_from(fmt, d, i)[0], i + struct.calcsize(fmt)
    sized = {
        0xC4: ">B",
        0xC5: ">H",
        0xC6: ">I",
        0xD9: ">B",
        0xDA: ">H",
        0xDB: ">I",
        0xDC: ">H",
        0xDD: ">I",
        0xDE: ">H",
        0xDF: ">I",
    }
    if tag not in sized:
        raise CodeObjectError(f"msgpack tag {tag:#x} not supported")
    fmt = sized[tag]
    n = struct.unpack_from(fmt, d, i)[0]
    i += struct.calcsize(fmt)
    if tag in (0xDC, 0xDD):
        return _msgpack_list(d, i, n)
    if tag in (0xDE, 0xDF):
        return _msgpack_map(d, i, n)
    raw = bytes(d[i : i + n])
    return (raw.decode() if tag >= 0xD9 else raw), i + n


def _msgpack_list(d, i, n):
    out = []
    for _ in range(n):
        v, i = _msgpack(d, i)
        out.append(v)
    return out, i


def _msgpack_map(d, i, n):
    out = {}
    for _ in range(n):
        k, i = _msgpack(d, i)
        out[k], i = _msgpack(d, i)
    return out, i


# --------------------------------------------------------------------------- descriptors
class KernelDescriptor:
    """The 64-byte ``amdhsa_kernel_descriptor_t``."""

    def __init__(self, raw):
        (self.lds_size, self.scratch_size, self.kernarg_size, _, self.entry_offset) = (
            struct.unpack_from("<IIIIq", raw, 0)
        )
        self.rsrc3, self.rsrc1, self.rsrc2, self.properties, self.preload = struct.unpack_from(
            "<IIIHH", raw, 44
        )
        r2, p = self.rsrc2, self.properties
        self.enable_private_segment = bool(r2 & 1)
        self.user_sgpr_count = (r2 >> 1) & 31
        self.wgid_x, self.wgid_y, self.wgid_z = (
            bool(r2 >> 7 & 1),
            bool(r2 >> 8 & 1),
            bool(r2 >> 9 & 1),
        )
        self.wg_info = bool(r2 >> 10 & 1)
        self.workitem_id_dims = (r2 >> 11) & 3
        self.float_mode = (self.rsrc1 >> 12) & 0xFF
        self.private_segment_buffer = bool(p & 1)
        self.dispatch_ptr = bool(p & 2)
        self.queue_ptr = bool(p & 4)
        self.kernarg_segment_ptr = bool(p & 8)
        self.dispatch_id = bool(p & 16)
        self.flat_scratch_init = bool(p & 32)
        self.private_segment_size = bool(p & 64)
        self.wave32 = bool(p & 1024)
        self.preload_length, self.preload_offset = self.preload & 127, self.preload >> 7


class KernelInfo:
    """One kernel: its symbol, descriptor, metadata and entry address."""

    def __init__(self, name, entry, descriptor, metadata):
        self.name, self.entry, self.descriptor, self.metadata = name, entry, descriptor, metadata
        self.args = metadata.get(".args", [])
        self.kernarg_size = metadata.get(".kernarg_segment_size", descriptor.kernarg_size)
        self.lds_size = metadata.get(".group_segment_fixed_size", descriptor.lds_size)
        self.scratch_size = metadata.get(".private_segment_fixed_size", descriptor.scratch_size)
        self.max_workgroup_size = metadata.get(".max_flat_workgroup_size", 1024)
        self.required_size = metadata.get(".reqd_workgroup_size")


def unbundle(image, arch):
    """The part of a clang offload bundle for ``arch``, or None; other images as they are."""
    if image[:24] != b"__CLANG_OFFLOAD_BUNDLE__":
        return image
    at = 32
    for _ in range(int.from_bytes(image[24:32], "little")):
        offset, size, n_name = struct.unpack_from("<QQQ", image, at)
        target = image[at + 24 : at + 24 + n_name].decode().rpartition("--")[2]
        at += 24 + n_name
        name, *features = target.split(":")
        if name == arch and not {"xnack+", "sramecc-"} & set(features):
            return image[offset : offset + size]
    return None


class CodeObject:
    """A parsed AMDGPU ELF shared object."""

    def __init__(self, blob):
        self.blob = blob = bytes(blob)
        if blob[:4] != b"\x7fELF" or blob[4] != 2 or struct.unpack_from("<H", blob, 18)[0] != 224:
            raise CodeObjectError(
                "not an ELF64 AMDGPU object (bundled output? compile with --no-gpu-bundle-output)"
            )
        flags = struct.unpack_from("<I", blob, 48)[0]
        self.machine, self.needs_xnack = _MACH.get(flags & 0xFF), flags & 0x300 == 0x300
        phoff, shoff = struct.unpack_from("<QQ", blob, 32)
        phsize, phnum, shsize, shnum = struct.unpack_from("<HHHH", blob, 54)
        self.segments, self.metadata, self.relocations = [], {}, []
        for i in range(phnum):
            kind, flags, off, va, _, fsize, msize, _ = struct.unpack_from(
                "<IIQQQQQQ", blob, phoff + i * phsize
            )
            if kind == 1:
                self.segments.append((va, blob[off : off + fsize], msize, flags))
            elif kind == 4:
                self._notes(blob[off : off + fsize])
        self.image_size = max((va + m for va, _, m, _ in self.segments), default=0)
        self.symbols = {}
        for i in range(shnum):
            fields = struct.unpack_from("<IIQQQQIIQQ", blob, shoff + i * shsize)
            if fields[1] in (2, 11):
                self._symbols(fields, shoff, shsize)
            elif fields[1] == 4:
                for o in range(fields[4], fields[4] + fields[5], 24):
                    self.relocations.append(struct.unpack_from("<QQq", blob, o))
        by_symbol = {k.get(".symbol"): k for k in self.metadata.get("amdhsa.kernels", [])}
        self.kernels = {}
        for name, (va, size) in self.symbols.items():
            if name.endswith(".kd") and size == 64:
                desc = KernelDescriptor(self.read(va, 64))
                base = name[:-3]
                self.kernels[base] = KernelInfo(
                    base, va + desc.entry_offset, desc, by_symbol.get(name, {})
                )

    def _notes(self, d):
        i = 0
        while i + 12 <= len(d):
            nsz, dsz, kind = struct.unpack_from("<III", d, i)
            name = d[i + 12 : i + 12 + nsz].rstrip(b"\0")
            start = i + 12 + (nsz + 3 & ~3)
            if kind == NT_AMDGPU_METADATA and name == b"AMDGPU":
                self.metadata = unpack_msgpack(d[start : start + dsz])
            i = start + (dsz + 3 & ~3)

    def _symbols(self, section, shoff, shsize):
        strtab = struct.unpack_from("<IIQQQQIIQQ", self.blob, shoff + section[6] * shsize)
        strings = self.blob[strtab[4] : strtab[4] + strtab[5]]
        for o in range(section[4], section[4] + section[5], 24):
            nm, _info, _, shndx, value, size = struct.unpack_from("<IBBHQQ", self.blob, o)
            name = strings[nm : strings.index(b"\0", nm)].decode()
            if name and shndx not in (0, 0xFFF1):
                self.symbols.setdefault(name, (value, size))

    def read(self, va, size):
        """Bytes of the loaded image at virtual address ``va``."""
        for base, data, msize, _ in self.segments:
            if base <= va and va + size <= base + msize:
                part = data[va - base : va - base + size]
                return part + bytes(size - len(part))
        raise CodeObjectError(f"address {va:#x} is in no loaded segment")


# --------------------------------------------------------------------------- disassembly
def find_tool(name):
    """Path of an LLVM tool: the newest ``name-NN`` in PATH, or ``name``."""
    for version in range(30, 16, -1):
        path = shutil.which(f"{name}-{version}")
        if path:
            return path
    path = shutil.which(name)
    if not path:
        raise CodeObjectError(f"{name} not found in PATH")
    return path


class Inst:
    """One instruction: mnemonic, operand strings, modifiers, address, size in bytes."""

    __slots__ = ("addr", "index", "mods", "name", "ops", "size", "target", "text", "words")

    def __init__(self, addr, size, text, name, ops, mods, target=None, words=()):
        self.addr, self.size, self.text, self.name = addr, size, text, name
        self.ops, self.mods, self.target, self.words = ops, mods, target, words

    def __repr__(self):
        return f"<{self.addr:#x}: {self.text}>"


_LINE = re.compile(r"^\t(\S.*?)\s*// ([0-9A-F]{12}):((?: [0-9A-F]{8})+)(?: <(.*)>)?\s*$")
_MOD_WORD = re.compile(
    r"^(offen|idxen|lds|glc|slc|sc0|sc1|nt|scc|tfe|gds|clamp|off|bound_ctrl|row_mirror|row_half_mirror|fi|"
    r"[a-z_0-9]+:\S+|swizzle\(.*\))$"
)


def _split_top(text):
    """Split at commas that are outside brackets, parentheses and quotes."""
    parts, depth, start, quoted = [], 0, 0, False
    for i, c in enumerate(text):
        if c == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif c in "[(":
            depth += 1
        elif c in "])":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    tail = text[start:].strip()
    if tail:
        parts.append(tail)
    return parts


def _split_words(text):
    out, depth, cur = [], 0, ""
    for c in text:
        if c in "[(":
            depth += 1
        elif c in "])":
            depth -= 1
        if c == " " and depth == 0:
            if cur:
                out.append(cur)
            cur = ""
        else:
            cur += c
    if cur:
        out.append(cur)
    return out


def parse_text(text):
    """Split ``text`` into (mnemonic, operands, modifiers)."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name in ("s_waitcnt",):
        return name, _split_words(rest), {}
    ops, mods = [], {}
    parts = _split_top(rest)
    for _k, part in enumerate(parts):
        words = _split_words(part)
        for j, word in enumerate(words):
            if word == "off" and j == 0:
                ops.append("off")
            elif (
                (j > 0 or ops or name.startswith(("buffer_", "s_")))
                and _MOD_WORD.match(word)
                and (j > 0 or ":" in word.split("[")[0] or word in ("gds", "clamp"))
            ):
                key, _, value = word.partition(":")
                mods[key] = value if value else True
            elif j == 0:
                ops.append(word)
            else:
                ops[-1] += " " + word
    return name, ops, mods


def parse_line(line):
    """Parse one ``llvm-objdump -d`` line, or return None when it is no instruction."""
    m = _LINE.match(line)
    if not m:
        return None
    text = re.sub(r"\s+", " ", m.group(1)).strip()
    addr = int(m.group(2), 16)
    words = tuple(int(w, 16) for w in m.group(3).split())
    name, ops, mods = parse_text(text)
    target = None
    if name in ("s_branch", "s_call_b64") or name.startswith("s_cbranch"):
        disp = words[0] & 0xFFFF
        target = addr + 4 + 4 * (disp - 0x10000 if disp & 0x8000 else disp)
    return Inst(addr, 4 * len(words), text, name, ops, mods, target, words)


class Listing:
    """The instructions of a code object; a function is disassembled when it is first looked at."""

    def __init__(self, code):
        self._code = code
        self._names = {va: name for name, (va, size) in code.symbols.items() if size}
        self._starts = sorted(self._names)
        self._functions = {}
        self._at = {}
        self.leaders = set()

    def function(self, start):
        """The instructions of the function that starts at ``start``."""
        if start not in self._functions:
            text = disassemble(self._code.blob, self._code.machine, self._names[start])
            insts = [i for i in map(parse_line, text.split("\n")) if i is not None]
            self._functions[start] = insts
            self._at.update((inst.addr, inst) for inst in insts)
            self.leaders.update(inst.target for inst in insts if inst.target is not None)
        return self._functions[start]

    def find(self, addr):
        """The instruction at ``addr``, or None."""
        if addr not in self._at:
            k = bisect.bisect_right(self._starts, addr) - 1
            if k >= 0:
                self.function(self._starts[k])
        return self._at.get(addr)

    def all(self):
        """Every instruction, in address order."""
        return [i for s in self._starts for i in self.function(s)]


def disassemble(blob, arch, symbol):
    """The text of one symbol, as llvm-objdump prints it."""
    with tempfile.NamedTemporaryFile(suffix=".co") as f:
        f.write(blob)
        f.flush()
        command = [find_tool("llvm-objdump"), "--mcpu=" + arch, "--disassemble-symbols=" + symbol]
        run = subprocess.run([*command, f.name], capture_output=True, text=True)
    if run.returncode:
        raise CodeObjectError("llvm-objdump failed: " + run.stderr.strip())
    return run.stdout
