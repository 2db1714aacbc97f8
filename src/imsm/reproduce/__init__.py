"""The paper's tables and figures anew: which runs each needs, doing them, and our figures beside the paper's."""
