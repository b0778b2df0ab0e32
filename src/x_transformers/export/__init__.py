"""Models as programs: ``torch.export`` with dynamic batch and length, and ONNX. Imported only when used."""

from x_transformers.export.onnx import onnx
from x_transformers.export.program import ExportError, Step, export, save

__all__ = ['ExportError', 'Step', 'export', 'onnx', 'save']
