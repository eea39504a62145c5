"""Three mistakes that an editor must see: a value, a name, an argument."""

from transformers import PreTrainedConfig

from xquant_fx import Nonsense, XQuantCache, XQuantConfig

config = XQuantConfig(k_bits="two")
cache = XQuantCache(PreTrainedConfig(), "long")
print(Nonsense, config, cache)
