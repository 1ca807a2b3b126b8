"""suasion: which feedback makes a small language model a better and honest persuader?"""

import os
import warnings

# Set before any library reads them: nothing here pings its makers, nothing is fetched behind the user's back, and forked
# workers do not fight over tokeniser threads.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# The libraries warn of their own deprecated names at every start; the versions are pinned.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")

__version__ = "0.1.0"
