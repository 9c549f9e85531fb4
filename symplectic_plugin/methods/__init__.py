"""Runge-Kutta methods as numerics: tableaux, explicit and implicit steps, the linear algebra of implicit ones."""
