from hypothesis import settings

# No deadline: the machines that run this are shared. No randomness between runs: what fails, fails again.
settings.register_profile("symplectic", deadline=None, derandomize=True)
settings.load_profile("symplectic")
