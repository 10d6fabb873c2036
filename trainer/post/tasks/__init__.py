"""Made-up tasks with answers that can be checked, for demos and tests: a function of the seed.

Imports no torch.
"""

from trainer.post.tasks.domains import DOMAINS, Task
from trainer.post.tasks.files import write_tasks

__all__ = ["DOMAINS", "Task", "write_tasks"]
