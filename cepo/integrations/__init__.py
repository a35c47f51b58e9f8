"""Token credit in the trainers of others. Each module needs the trainer it is named after."""
