from .store import POLICIES as POLICIES
