"""What outlives a process: files that are whole or absent, and the identity of a model."""

from laplace_debiased.persistence.checkpoint import FitCheckpoint, WalkProgress, digest_of
from laplace_debiased.persistence.files import read_record, remove_file, write_record
from laplace_debiased.persistence.identity import ModelFingerprint, TensorPrint, fingerprint
from laplace_debiased.persistence.watch import ModelWatch

__all__ = [
    "FitCheckpoint",
    "ModelFingerprint",
    "ModelWatch",
    "TensorPrint",
    "WalkProgress",
    "digest_of",
    "fingerprint",
    "read_record",
    "remove_file",
    "write_record",
]
