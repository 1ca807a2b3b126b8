"""The table of usual machines: what they have and what they cost, with date and source in `machines.yaml` beside this module."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from suasion.errors import UsageError

TABLE = Path(__file__).with_name("machines.yaml")
HOURS_A_MONTH = 730


class Gpu(BaseModel):
    """One GPU: dense bf16 peak in TFLOP/s, memory bandwidth in GB/s, memory in GiB."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    tflops: float = Field(gt=0)
    gbps: float = Field(gt=0)
    gib: float = Field(gt=0)


class Machine(BaseModel):
    """A kind of machine with GPUs. price: dollars an hour on demand, None where the table does not know it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vcpus: int = Field(gt=0)
    host_gib: float = Field(gt=0)
    gpus: int = Field(gt=0)
    gpu: Gpu
    price: float | None = None


class MachineTable(BaseModel):
    """All machines by name, with the day on which the prices were looked up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: object
    region: str
    volume_gb_month: float
    address_hour: float
    machines: dict[str, Machine]

    def side_costs(self, volume_gb: float) -> float:
        """Dollars an hour of a machine's volume and public address."""
        return volume_gb * self.volume_gb_month / HOURS_A_MONTH + self.address_hour


def load_machines(path: Path = TABLE) -> MachineTable:
    """Read the table. Raises UsageError with the field that is wrong."""
    try:
        return MachineTable.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as a table of machines: {error}. The shipped one is {TABLE}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}. The shipped table is {TABLE}.") from error
