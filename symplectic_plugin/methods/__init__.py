"""Runge-Kutta methods as numerics: tableaux, explicit and implicit steps and their partners, linear algebra."""
