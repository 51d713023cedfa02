"""What an adapter folder holds, in a few lines: read from its two files, without a model."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from preft.adapter_files import factors_by_path, read_adapter, read_tensors
from preft.vllm.identity import folder_stamp, read_identity


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter folder in figures; `bytes` counts its files, `parameters` the saved values."""

    folder: str
    method: str
    phase: str
    history: str
    ranks: dict[int, int]  # rank -> number of modules
    scales: dict[float, int]  # scale -> number of modules
    modules: dict[str, int]  # last component of a module's path -> how many
    parameters: int
    bytes: int
    dtypes: list[str]
    base_model: str
    base_model_fingerprint: str | None
    digest: str
    format: str
    strict: bool

    def lines(self) -> list[str]:
        """One line a property, for people."""
        modules = ", ".join(f"{count} x {name}" for name, count in self.modules.items())
        return [
            f"{'method':12} {self.method}, phase {self.phase}, history {self.history}",
            f"{'rank':12} {_counted(self.ranks)}",
            f"{'scale':12} {_counted(self.scales)}",
            f"{'modules':12} {modules}",
            f"{'parameters':12} {self.parameters:,} ({', '.join(self.dtypes)}), files of {self.bytes:,} bytes",
            f"{'base model':12} {self.base_model or 'not named'}, fingerprint {self.base_model_fingerprint or 'none'}",
            f"{'digest':12} {self.digest}",
            f"{'format':12} {self.format}{', refused by other loaders' if self.strict else ''}",
        ]


def summarise(folder: Path | str) -> AdapterSummary:
    """Read an adapter folder; AdapterError where it is none, or its files do not belong together."""
    saved, tensors = read_adapter(folder), read_tensors(folder)
    config = saved.config
    factors = factors_by_path(tensors, config)
    return AdapterSummary(
        folder=str(folder),
        method=config.method,
        phase=config.phase.value,
        history=config.history.value,
        ranks=dict(sorted(Counter(len(a_RI) for a_RI, _ in factors.values()).items())),
        scales=dict(sorted(Counter(config.scale_of(path) for path in factors).items())),
        modules=_kinds(list(factors), config.is_lora),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum(size for _, size, _ in folder_stamp(Path(folder))),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        base_model=saved.base_model,
        base_model_fingerprint=saved.base_model_fingerprint,
        digest=read_identity(Path(folder)).digest,
        format="peft" if saved.format_version is None else f"preft {saved.format_version}",
        strict=saved.strict,
    )


def _kinds(paths: list[str], is_lora: bool) -> dict[str, int]:
    if not is_lora:
        return {"output of a block": len(paths)}
    return dict(Counter(path.rpartition(".")[2] for path in paths))


def _counted(values: dict[int, int] | dict[float, int]) -> str:
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({count} modules)" for value, count in values.items())
