//! Entry point of `reprotect-agent`: parses the command line, starts logging, dispatches, and turns errors into an
//! exit status.

use std::process::ExitCode;

use clap::Parser;
use reprotect_agent::cli::{Cli, Command};
use reprotect_agent::config::Settings;
use reprotect_agent::{commands, service};
use reprotect_engine::host::logging;
use reprotect_engine::host::output::{EXIT_FAILED, EXIT_OK, EXIT_USAGE, Output};

fn main() -> ExitCode {
    match dispatch(&Cli::parse()) {
        Ok(()) => ExitCode::from(EXIT_OK),
        Err(error) => {
            eprintln!("reprotect-agent: {error:#}");
            ExitCode::from(if commands::is_usage(&error) { EXIT_USAGE } else { EXIT_FAILED })
        }
    }
}

fn dispatch(cli: &Cli) -> anyhow::Result<()> {
    let output = Output::new(cli.global.json);
    let overrides = cli.global.overrides();
    if let Command::CheckConfig(args) = &cli.command {
        return commands::check_config(&overrides, args, output);
    }
    let settings = Settings::load(&overrides)?;
    logging::init(&settings.log);
    match &cli.command {
        Command::Disks(args) => commands::disks(&settings, args, output),
        Command::CheckConfig(_) => Ok(()),
        Command::Check(_) => service::check(&settings, output),
        Command::Enroll(args) => service::enroll(&settings, args, output),
        Command::Run(args) => service::run(settings, args),
        Command::Status(args) => service::status(&settings, args, output),
        Command::Mark(args) => service::mark(&settings, args, output),
        Command::Unfollow(_) => service::unfollow(&settings, output),
    }
}
