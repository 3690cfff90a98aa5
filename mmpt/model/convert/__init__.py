"""Published weights into our models, and ours into published formats.

files      safetensors or PyTorch's, headers first --> Weights
settings   their config, field by field, against ours
rules      which tensor is made of which, in both directions
llama, bert, whisper, open_clip    the tables of each architecture
initialize every `init` of a config;  export    a folder that the library opens
"""

from mmpt.model.convert.export import Target, write_checkpoint
from mmpt.model.convert.initialize import initialize_from

__all__ = ["Target", "initialize_from", "write_checkpoint"]
