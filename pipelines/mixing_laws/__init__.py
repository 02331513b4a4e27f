"""mixing_laws"""
