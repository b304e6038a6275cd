"""cupyflash inside other frameworks.  Each module is imported by those who have the framework, and by nobody else."""
