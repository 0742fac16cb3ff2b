"""One model over several devices: what each has of it, what they tell each other, and the processes that they are."""
